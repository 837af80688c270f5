"""Two ranks of data parallelism are one process with their rows together."""

from pathlib import Path

import pytest
import torch

from kd_plugin.cache import Sampled, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from tests.equivalence.test_offline_packing import COMPLETIONS, TEXTS
from tests.hosts.runs import assert_same, launched


def run(directory: Path, cache: TeacherCache, student: str, ranks: int, rows_a_rank: int, *options: str) -> dict:
    directory.mkdir()
    launched("tests.hosts.offline_worker", ranks, directory, cache.path, student, rows_a_rank, *options)
    return torch.load(directory / "result.pt")


@pytest.mark.parametrize(
    ("variant", "rows", "targets", "options"),
    [
        ("tied", COMPLETIONS, TopK(16), ()),
        ("padded", COMPLETIONS, TopK(16), ("partial",)),
        ("softcapped", TEXTS, Sampled(20), ("packed",)),
        ("biased", TEXTS, TopK(8), ("streamed",)),
    ],
    ids=["padded rows", "partial", "packed", "streamed"],
)
def test_two_ranks_train_as_one_process(variant, rows, targets, options, tmp_path, variant_dir, teacher_dir):
    teacher, student = LocalTeacher(teacher_dir, dtype="float32"), variant_dir(variant)
    cache = capture(rows, teacher, tmp_path / "cache", targets=targets, progress=False)
    cache.dataset()  # built once, before two processes ask for it
    one = run(tmp_path / "one", cache, student, 1, 2, *options)
    two = run(tmp_path / "two", cache, student, 2, 1, *options)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(one["losses"]) == 4
    assert_same(two["weights"], one["weights"], 1e-4)
