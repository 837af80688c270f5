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


def test_student_and_teachers_under_fsdp2_train_as_one_process(student_dir, teacher_dir, other_teacher_dir, tmp_path):
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    offloaded = {name: {"path": path, "placement": "offload"} for name, path in teachers.items()}
    common = {"method": "panel", "stage": None, "steps": 2, "student": student_dir, "arguments": GREEDY}
    common["output_dir"] = str(tmp_path / "out")
    jobs = {
        "cut": {**common, "teachers": teachers, "fsdp": {"reshard_after_forward": True}},
        "offloaded": {**common, "teachers": offloaded, "fsdp": {"reshard_after_forward": True}},
    }
    (alone,) = run_all({"one": {**common, "teachers": teachers, "rows": 4}}, tmp_path / "alone", ranks=1)["one"]
    found = run_all(jobs, tmp_path / "two", timeout=600)
    for name, ranks in found.items():
        for rank in ranks:
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-4), name
            assert rank["norm"] == pytest.approx(alone["norm"], rel=1e-4), name
            assert rank["sharded"] == (["a", "b"] if name == "cut" else [])
