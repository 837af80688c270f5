"""Which row of a cache a sequence of tokens finds."""

import numpy as np
import pytest

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import DataError
from kd_plugin.teachers import LocalTeacher

PARTS = [("ab", "cd"), ("abc", "d"), ("ab", "cd")]
SAME_TOKENS = [{"prompt": prompt, "completion": completion} for prompt, completion in PARTS]


def test_rows_of_the_same_tokens_are_told_apart_and_complete_each_other(teacher_dir, tmp_path):
    """The second row has the tokens of the first, of which it masks one more."""
    cache = capture(SAME_TOKENS, LocalTeacher(teacher_dir), tmp_path / "c", targets=TopK(4), progress=False)
    rows = cache.dataset()
    assert len(set(rows["example_id"])) == 1
    ids, own = rows[0]["input_ids"], rows["teacher_index"]
    assert cache.teacher_indices_of(rows[0]["example_id"]) == own
    assert cache.teacher_index(ids) == cache.teacher_index(ids, twin=3) == own[0]
    assert cache.teacher_index(ids, twin=2) == own[2]
    mixed = cache.teacher_index(ids, twin=1)
    assert mixed[2:] == own[1][2:] and mixed[1] == own[2][1] and own[1][1] == -1


def test_a_row_is_found_by_what_the_capture_kept_of_it(teacher_dir, tmp_path):
    rows = [{"text": "a text of some length"}, {"text": "short"}]
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    whole = capture(rows, teacher, tmp_path / "whole", targets=TopK(4), progress=False).dataset()
    cache = capture(rows, teacher, tmp_path / "cut", targets=TopK(4), max_length=9, progress=False)
    kept = cache.dataset()
    assert [len(row["input_ids"]) for row in kept] == [9, 6]
    for row, cut in zip(whole, kept, strict=True):
        found = cache.teacher_index(np.array(row["input_ids"]))
        assert found == cut["teacher_index"] + [-1] * (len(row["input_ids"]) - len(cut["input_ids"]))
    for unknown in ([*whole[1]["input_ids"], 5], whole[0]["input_ids"][:8]):  # longer than a row that was not cut
        assert cache.find_index(unknown) is None
        with pytest.raises(DataError, match=rf"no row with these {len(unknown)} tokens: \[{unknown[0]}, "):
            cache.teacher_index(unknown)
