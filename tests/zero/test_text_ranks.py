"""Text teachers on ranks of which some have no correction: DDP, ZeRO and FSDP2 train as one process, and none waits."""

import pytest

from tests.zero.ranks import run_all

pytestmark = pytest.mark.zero
WRONG = ["answer 6", "answer 7"]  # two rows of eight are corrected
KINDS = {
    "text": {"text": {}, "teachers": {}},
    "kept": {"text": {"keep_weight": 0.5, "earlier_weight": 0.5}, "teachers": {}},
    "mixed": {"text": {}},
    "adapter": {"text": {}, "lora": True},
    "pairs": {"text": {"preference": "dpo"}},
}


def jobs(student, teacher, directory, kinds, **how):
    """One row a rank and two micro-batches a step: in most steps a rank has no correction, in some nobody has."""
    common = {"method": "panel", "student": student, "teachers": {"a": teacher}, "given": True, "wrong": WRONG}
    common |= {"steps": 4, "accumulate": 2, "completion": 16}
    return {name: {**common, **KINDS[name], "output_dir": str(directory / name), **how} for name in kinds}


def assert_as_alone(found, alone, names):
    for name in names:
        for rank in found[name]:
            assert rank["losses"] == pytest.approx(alone[name][0]["losses"], rel=1e-3, abs=1e-6), name
            assert rank["norm"] == pytest.approx(alone[name][0]["norm"], rel=1e-4), name


@pytest.fixture(scope="module")
def alone(untied_student_dir, teacher_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    found = run_all(
        jobs(untied_student_dir, teacher_dir, directory, KINDS, stage=None, rows=2), directory / "job", 1, timeout=600
    )
    assert all(any(loss > 0 for loss in found[name][0]["losses"]) for name in KINDS)
    return found


@pytest.mark.parametrize("stage", [None, 2, 3], ids=["ddp", "zero2", "zero3"])
def test_ranks_without_a_correction_train_as_one_process(stage, alone, untied_student_dir, teacher_dir, tmp_path):
    kinds = [name for name in KINDS if stage is None or name != "pairs"]  # DeepSpeed has no whole copy of the start
    found = run_all(
        jobs(untied_student_dir, teacher_dir, tmp_path, kinds, stage=stage, rows=1), tmp_path / "job", timeout=600
    )
    assert_as_alone(found, alone, kinds)


def test_fsdp2(alone, untied_student_dir, teacher_dir, tmp_path):
    kinds = ["text", "kept", "mixed"]
    how = {"stage": None, "rows": 1, "fsdp": {"reshard_after_forward": True}}
    told = jobs(untied_student_dir, teacher_dir, tmp_path, kinds, **how, arguments={"gradient_checkpointing": False})
    assert_as_alone(run_all(told, tmp_path / "job", timeout=600), alone, kinds)
