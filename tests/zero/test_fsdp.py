"""Teachers cut by FSDP2 on two gloo ranks: they score as whole ones, and TRL trains as one process does."""

import subprocess

import pytest

from tests.zero.ranks import CHECKOUT, environment, reports, run_all, torchrun

pytestmark = pytest.mark.zero
# Completions without chance, so that one process and two write the same
GREEDY = {"top_k": 1, "gradient_checkpointing": False}


def test_a_cut_teacher_scores_as_a_whole_one(teacher_dir, other_teacher_dir, tmp_path):
    """On the device and, with FSDP2's offload policy, in host memory."""
    command = [*torchrun(2)[:-1], "tests.zero.fsdp_scores", teacher_dir, other_teacher_dir, str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for report in reports(tmp_path, 2):
        assert len(report) == 4
        for name, score in report.items():
            assert score["sharded"] and score["held"] == pytest.approx(0.5, abs=0.05), name
            assert score["largest"] > 0.01 and score["apart"] < 1e-5 * score["largest"], name


def test_student_and_teachers_under_fsdp2_train_as_one_process(
    student_dir, untied_student_dir, teacher_dir, other_teacher_dir, cache, tmp_path
):
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    offloaded = {name: {"path": path, "placement": "offload"} for name, path in teachers.items()}
    common = {"stage": None, "steps": 2, "arguments": GREEDY, "output_dir": str(tmp_path / "out")}
    told = {
        "panel": {"method": "panel", "teachers": teachers},
        "offloaded": {"method": "panel", "teachers": offloaded},
        "offline": {"method": "offline", "cache": cache, "arguments": {"gradient_checkpointing": False}},
        "offline, ce": {
            "method": "offline",
            "cache": cache,
            "arguments": {"gradient_checkpointing": False, "ce_weight": 0.3},
        },
    }
    jobs = {
        f"{kind}, {name}": {**common, **one, "student": student}
        for name, student in {"tied": student_dir, "untied": untied_student_dir}.items()
        for kind, one in told.items()
    }
    alone = run_all({name: {**one, "rows": 4} for name, one in jobs.items()}, tmp_path / "alone", ranks=1, timeout=600)
    cut = {name: {**one, "fsdp": {"reshard_after_forward": True}} for name, one in jobs.items()}
    for name, ranks in run_all(cut, tmp_path / "two", timeout=900).items():
        expected = alone[name][0]
        for rank in ranks:
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-4), name
            assert rank["norm"] == pytest.approx(expected["norm"], rel=1e-4), name
            if not name.startswith("offline"):
                assert rank["sharded"] == ([] if name.startswith("offloaded") else ["a", "b"])
