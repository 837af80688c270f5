"""Teachers wherever they may lie under DeepSpeed: each gives the losses of a run in one process."""

import pytest
from peft import LoraConfig

from tests.core.test_adapter_teacher import save_adapter
from tests.hosts.runs import LORA
from tests.zero.ranks import run_all

pytestmark = pytest.mark.zero
# Completions without chance, so that one process and two write the same
GREEDY = {"top_k": 1, "gradient_checkpointing": False}


@pytest.fixture(scope="module", params=["student_dir", "untied_student_dir"])
def student(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, student, teacher_dir):
    """An adapter on the student's base, and two on a base of their own."""
    root, other = tmp_path_factory.mktemp("adapters"), LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
    return {
        "own": {"adapter": save_adapter(student, root / "own", LORA, 1), "base": "student"},
        "math": {"adapter": save_adapter(teacher_dir, root / "math", LORA, 2), "base": teacher_dir},
        "code": {"adapter": save_adapter(teacher_dir, root / "code", other, 3), "base": teacher_dir},
    }


def panel(student_dir, where, teachers, stage, *, rows=2, lora=True, **arguments):
    told = {"method": "panel", "stage": stage, "rows": rows, "lora": lora, "teachers": teachers, "steps": 3}
    return told | {"student": student_dir, "output_dir": str(where), "arguments": {**GREEDY, **arguments}}


def test_adapters_and_offloaded_teachers_at_every_stage(adapters, student, teacher_dir, other_teacher_dir, tmp_path):
    panels = {
        "adapters": {**adapters, "whole": other_teacher_dir},
        "offloaded": {
            "a": {"path": teacher_dir, "placement": "offload"},
            "b": {"path": other_teacher_dir, "placement": "offload"},
        },
    }
    jobs, alone = {}, {}
    for name, teachers in panels.items():
        alone[name] = panel(student, tmp_path / name, teachers, None, rows=4)
        for stage in (1, 2, 3):
            jobs[f"{name}{stage}"] = panel(student, tmp_path / name, teachers, stage)
        jobs[f"{name}2cut"] = panel(student, tmp_path / name, teachers, 2, shard_teachers=True)
    expected = run_all(alone, tmp_path / "alone", ranks=1)
    found = run_all(jobs, tmp_path / "two", timeout=600)
    for name in jobs:
        assert found[name][0]["losses"] == pytest.approx(expected[name.rstrip("123cut")][0]["losses"], rel=1e-3), name


def test_interleaved_rollouts_at_every_stage(adapters, student, teacher_dir, other_teacher_dir, tmp_path):
    """The panel replaces what is not its first token: ranks need different numbers of rounds for the same text."""
    teachers = {"own": adapters["own"], "a": teacher_dir, "b": {"path": other_teacher_dir, "placement": "offload"}}
    writing = {"rollouts": "interleaved", "interleaved_top_k": 1, "interleaved_block": 3}

    def job(stage, **further):
        return panel(student, tmp_path / "out", teachers, stage, **writing, **further)

    expected = run_all({"": {**job(None), "rows": 4}}, tmp_path / "alone", ranks=1)[""][0]["losses"]
    jobs = {str(stage): job(stage) for stage in (1, 2, 3)}
    jobs |= {"2 cut": job(2, shard_teachers=True), "3 in parts": job(3, ds3_gather_for_generation=False)}
    for name, reports in run_all(jobs, tmp_path / "two", timeout=600).items():
        assert reports[0]["losses"] == pytest.approx(expected, rel=1e-3), name
