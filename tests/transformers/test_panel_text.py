"""Text teachers on a plain transformers trainer over ranks of which some have no correction."""

import pytest
import torch

from kd_plugin.lineage.data import TEXT_RECORD
from kd_plugin.text.dataset import text_source
from tests.hosts.runs import assert_same, launched

JOBS = {"text": ("", ""), "preference": ("dpo", ""), "dies": ("", "one")}  # the last for one of two ranks


@pytest.fixture(scope="module")
def directories(tmp_path_factory, student_dir):
    """Return where each job left what it did, by the number of ranks."""
    root, found = tmp_path_factory.mktemp("ranks"), {}
    for ranks in (1, 2):
        names = [name for name in JOBS if ranks == 2 or name != "dies"]
        found |= {(name, ranks): root / f"{name} on {ranks}" for name in names}
        for name in names:
            found[name, ranks].mkdir()
        jobs = [(found[name, ranks], student_dir, 8 // ranks, *JOBS[name]) for name in names]
        launched("tests.transformers.text_worker", ranks, *jobs)
    return found


@pytest.mark.parametrize("name", ["text", "preference"])
def test_two_ranks_take_the_steps_of_one(name, directories):
    """Two of eight rows are corrected, of a rank's four often none; no rank waits for another, and the mean is one."""
    for ranks in (1, 2):
        round_0 = directories[name, ranks] / "run" / "rounds" / "round-0000"
        assert text_source(round_0).record["outputs"]["rows"] == 24
    one, two = (torch.load(directories[name, ranks] / "result-0.pt") for ranks in (1, 2))
    assert len(one["losses"]) == 3 and one["losses"][0] > 0
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert_same(two["weights"], one["weights"], 1e-3)


def test_a_teacher_that_dies_for_one_rank_ends_both(directories):
    where = directories["dies", 2]
    first, second = (torch.load(where / f"result-{rank}.pt")["failed"] for rank in (0, 1))
    assert "on 1 other rank(s)" in first and "cannot be reached" in second
    assert not (where / "run" / "rounds" / "round-0000" / TEXT_RECORD).exists()
