"""Teachers wherever they may lie under DeepSpeed: each gives the losses of a run in one process."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.core.test_adapter_teacher import save_adapter
from tests.fake_vllm import Behaviour, fake_vllm
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


def test_the_heads_of_servers_lie_where_teachers_do(student_dir, teacher_dir, other_teacher_dir, tokenizer, tmp_path):
    """Hidden states from servers, routed, so that a rank may have no row for one: the losses of two local teachers."""
    local = {"a": teacher_dir, "b": other_teacher_dir}
    with contextlib.ExitStack() as stack:
        far: dict[str, dict] = {}
        for name, repo in local.items():
            model = AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32).eval()
            url, _ = stack.enter_context(fake_vllm(model, tokenizer, Behaviour(runner="pooling")))
            far[name] = {"url": url, "repo": repo}
        far["b"]["placement"] = "offload"
        told = {"routing": 5, "lora": False}
        jobs = {str(stage): panel(student_dir, tmp_path / "out", far, stage) | told for stage in (2, 3)}
        jobs["2 cut"] = panel(student_dir, tmp_path / "out", far, 2, shard_teachers=True) | told
        found = run_all(jobs, tmp_path / "two", timeout=600)
    alone = panel(student_dir, tmp_path / "alone", local, None, rows=4, lora=False) | {"routing": 5}
    expected = run_all({"": alone}, tmp_path / "one", ranks=1)[""][0]["losses"]
    for name, reports in found.items():
        assert reports[0]["losses"] == pytest.approx(expected, rel=1e-3), name
        assert reports[0]["sharded"] == ([] if name == "2" else ["a"]), name


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
