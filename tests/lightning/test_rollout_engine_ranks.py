"""A server generates for a Lightning student over two ranks: DDP, ZeRO-3 and FSDP2 take the steps of one process."""

import contextlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_vllm import Behaviour, fake_vllm
from tests.lightning.launch import run_ranks

ROWS = [{"prompt": "abcdefgh"[i % 8] * (3 + i % 5)} for i in range(16)]


def start(name, directory, jobs, ranks):
    """Run all ranks to their end, and return the losses of each job."""
    directory.mkdir()
    (directory / "jobs.json").write_text(json.dumps(jobs))
    run_ranks("tests.lightning.ranks", [name, directory, directory / "jobs.json"], ranks)
    return json.loads((directory / "losses.json").read_text())


@pytest.mark.zero
@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_adapters_whole_weights_and_staleness_reach_a_server(
    name, untied_student_dir, teacher_dir, tokenizer, tmp_path
):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = {"model": untied_student_dir, "teacher_models": {"t": teacher_dir}, "top_k": 1, "max_completion_length": 4}
    common = {"data": {"prompts": str(tmp_path / "prompts.jsonl")}, "saved": False}
    # Under ZeRO-3 a module of one's own cannot add an adapter, which the ready module can
    ready = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
    kinds = {"reload": {"own": "plain"}, "adapter": {"own": "adapted"}}
    if name == "zero3":
        kinds["adapter"] = {"model": model | ready}
    alone = start(
        "single", tmp_path / "single", {sync: common | {"model": model} | own for sync, own in kinds.items()}, 1
    )
    with contextlib.ExitStack() as stack:
        jobs, loads = {}, {}
        for sync, own in kinds.items():
            served = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
            url, loads[sync] = stack.enter_context(fake_vllm(served, tokenizer, Behaviour()))
            engine = {"url": url, "sync": sync, "chunk": 3, "directory": str(tmp_path / f"{name}-{sync}")}
            jobs[sync] = common | {"model": model} | own
            jobs[sync]["model"] = jobs[sync]["model"] | {"rollout_engine": engine}
        served = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
        url, loads["ahead"] = stack.enter_context(fake_vllm(served, tokenizer, Behaviour()))
        engine = {"url": url, "sync": "reload", "max_staleness": 2, "directory": str(tmp_path / f"{name}-ahead")}
        jobs["ahead"] = common | {"model": model | {"rollout_engine": engine}, "own": "plain"}
        found = start(name, tmp_path / name, jobs, 2)
    for sync, losses in found.items():
        path = "/v1/load_lora_adapter" if sync == "adapter" else "/collective_rpc"
        assert [one for one, _, _ in loads[sync].requests].count(path) == 4, "one rank, once a step"
        if sync == "ahead":
            assert len(losses) == 4 and losses[0] == pytest.approx(alone["reload"][0], rel=1e-3)
        else:
            assert losses == pytest.approx(alone[sync], rel=1e-3), (name, sync)
