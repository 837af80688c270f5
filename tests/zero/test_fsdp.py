"""Teachers cut by FSDP2 in TRL, on two gloo ranks: each run gives the losses of one process."""

import pytest

from tests.zero.ranks import run_all

pytestmark = pytest.mark.zero
# Completions without chance, so that one process and two write the same
GREEDY = {"top_k": 1, "gradient_checkpointing": False}


def panel(student_dir, where, teachers, **more):
    told = {"method": "panel", "stage": None, "teachers": teachers, "steps": 2, "student": student_dir}
    return told | {"output_dir": str(where), "arguments": GREEDY, "rows": 2, **more}


def test_teachers_and_student_under_fsdp2_train_as_one_process(student_dir, teacher_dir, other_teacher_dir, tmp_path):
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    offloaded = {name: {"path": path, "placement": "offload"} for name, path in teachers.items()}
    jobs = {
        "cut": panel(student_dir, tmp_path, teachers, fsdp={"reshard_after_forward": True}),
        "host memory": panel(student_dir, tmp_path, teachers, fsdp={"cpu_offload": True}),
        "offloaded": panel(student_dir, tmp_path, offloaded, fsdp={"reshard_after_forward": True}),
    }
    (alone,) = run_all({"one": panel(student_dir, tmp_path, teachers, rows=4)}, tmp_path / "alone", ranks=1)["one"]
    found = run_all(jobs, tmp_path / "two", timeout=600)
    for name, ranks in found.items():
        assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-3), name
        assert ranks[0]["sharded"] == ([] if name == "offloaded" else ["a", "b"])
