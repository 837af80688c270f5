"""Text teachers on a plain transformers trainer over ranks of which some have no correction."""

import pytest
import torch

from kd_plugin.lineage.data import TEXT_RECORD
from kd_plugin.text.dataset import text_source
from tests.hosts.runs import assert_same, launched


@pytest.mark.parametrize("preference", ["", "dpo"])
def test_two_ranks_take_the_steps_of_one(preference, tmp_path, student_dir):
    """Two of eight rows are corrected, of a rank's four often none; no rank waits for another, and the mean is one."""
    found = []
    for ranks, rows in ((1, 8), (2, 4)):
        out = tmp_path / f"{ranks}"
        out.mkdir()
        launched("tests.transformers.text_worker", ranks, out, student_dir, rows, preference, "")
        found.append(torch.load(out / "result-0.pt"))
        assert text_source(out / "run" / "rounds" / "round-0000").record["outputs"]["rows"] == 24
    one, two = found
    assert len(one["losses"]) == 3 and one["losses"][0] > 0
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert_same(two["weights"], one["weights"], 1e-3)


def test_a_teacher_that_dies_for_one_rank_ends_both(tmp_path, student_dir):
    launched("tests.transformers.text_worker", 2, tmp_path, student_dir, 4, "", "one")
    first, second = (torch.load(tmp_path / f"result-{rank}.pt")["failed"] for rank in (0, 1))
    assert "on 1 other rank(s)" in first and "cannot be reached" in second
    assert not (tmp_path / "run" / "rounds" / "round-0000" / TEXT_RECORD).exists()
