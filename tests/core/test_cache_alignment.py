"""A cache whose targets belong to the neighbouring token is noticed from its data alone."""

import re

import pytest
import torch
from datasets import Dataset

from kd_plugin.cache import TeacherCache, TopK, capture
from kd_plugin.cache.alignment import measure_alignment, require_aligned
from kd_plugin.errors import CacheError
from kd_plugin.teachers import LocalTeacher


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    """A capture of what the teacher itself wrote, as distillation uses it."""
    teacher = LocalTeacher(teacher_dir, dtype="float32")
    torch.manual_seed(0)
    start = torch.randint(3, 259, (8, 4))
    written = teacher.model.generate(start, max_new_tokens=24, do_sample=True, eos_token_id=None)
    rows = [{"input_ids": ids, "completion_mask": [0] * 4 + [1] * 24} for ids in written.tolist()]
    directory = tmp_path_factory.mktemp("cache") / "own"
    return capture(Dataset.from_list(rows), teacher, directory, targets=TopK(64), progress=False)


class Shifted(TeacherCache):
    by = 1

    def signal(self, teacher_index):
        return super().signal((teacher_index + self.by).clamp(0, self.tokens - 1))


def test_an_aligned_cache_passes(cache):
    found = require_aligned(cache)
    assert found.shift == 0
    assert found.positions > 100
    assert found.logprob[0] > max(found.logprob[-1], found.logprob[1]) + 0.5


@pytest.mark.parametrize("by", [-1, 1])
def test_a_shifted_cache_is_refused(cache, by):
    shifted = type("Shifted", (Shifted,), {"by": by})(cache.path)
    assert measure_alignment(shifted).shift == by
    with pytest.raises(CacheError, match=re.escape(f"shifted by {by:+d} token")):
        require_aligned(shifted)
