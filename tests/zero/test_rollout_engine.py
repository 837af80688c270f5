"""A server generates for a student over several ranks: who gathers and writes, and that nobody waits for ever."""

import contextlib
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.rollouts.vllm.weights import layer_by_layer
from tests.fake_vllm import Behaviour, fake_vllm
from tests.tcp_group import TcpGroup
from tests.tiny import save_tiny, tiny_llama
from tests.zero.ranks import run_all

GREEDY = {"top_k": 1, "gradient_checkpointing": False}
# Some ranks hold no row that the student generates, in some steps
UNEVEN = {"given": True, "arguments": {**GREEDY, "on_policy_fraction": 0.3}}


def job(student, teacher, out, stage, *, engine=None, lora=False, arguments=GREEDY, **more):
    """A ZeRO stage, ``fsdp`` for FSDP2, or None for DDP."""
    told = {"method": "panel", "stage": stage, "rows": 2, "lora": lora, "teachers": {"t": teacher}, "steps": 3, **more}
    if stage == "fsdp":
        told |= {"stage": None, "fsdp": {"reshard_after_forward": True}}
    chosen = {} if engine is None else {"rollout_engine": engine}
    return told | {"student": student, "output_dir": str(out), "arguments": {**arguments, **chosen}}


def run_apart(jobs, directory, **options):
    """Run the jobs with DeepSpeed in one start, those with FSDP2 in another, and those with neither in a third."""
    kinds: dict = {}
    for name, one in jobs.items():
        kinds.setdefault("fsdp" if one.get("fsdp") else "ddp" if one["stage"] is None else "zero", {})[name] = one
    found: dict = {}
    for kind, some in kinds.items():
        found |= run_all(some, directory / kind, **options)
    return found


@pytest.mark.zero
@pytest.mark.parametrize("stages", [(None, 2, 3), ("fsdp",)], ids=["DDP and ZeRO", "FSDP2"])
def test_adapters_and_whole_weights_reach_a_server_from_shards(
    stages, untied_student_dir, teacher_dir, tokenizer, tmp_path
):
    """Even and uneven batches: the losses of generation in process."""
    with contextlib.ExitStack() as stack:
        jobs, own, behaviours = {}, {}, {}
        for sync in ("adapter", "reload"):  # which changes the base
            model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
            url, behaviours[sync] = stack.enter_context(fake_vllm(model, tokenizer, Behaviour()))
            engine = {"kind": "vllm", "url": url, "sync": sync, "chunk": 5}
            for stage in stages:
                for name, more in (("even", {}), ("uneven", UNEVEN)):
                    if name == "uneven" and stage == 2:
                        continue
                    common = {"lora": sync == "adapter", **more}
                    where = (untied_student_dir, teacher_dir, tmp_path / f"{sync}-{stage}-{name}", stage)
                    jobs[f"{sync}-{stage}-{name}"] = job(*where, engine=engine, **common)
                    if stage != 2:
                        own[f"{sync}-{stage}-{name}"] = job(*where, **common)
        found = run_apart(jobs, tmp_path / "server")
    expected = run_apart(own, tmp_path / "own")
    for name, reports in found.items():
        other = name.replace("-2-", "-3-")
        assert reports[0]["losses"] == pytest.approx(expected[other][0]["losses"], rel=1e-3), name
        assert reports[0]["steps"] == 3
    for sync, path in (("adapter", "/v1/load_lora_adapter"), ("reload", "/collective_rpc")):
        loads = [one for one, _, _ in behaviours[sync].requests if one == path]
        assert len(loads) == 3 * len(jobs) // 2, "one rank, once a step"


@pytest.mark.zero
def test_tensors_are_sent_one_by_one_from_shards(untied_student_dir, teacher_dir, tokenizer, tmp_path):
    """``sync: nccl`` with TCP in NCCL's place; a server that dies among the tensors ends both ranks, at once."""

    def join(master_address, master_port, rank_offset, world_size, packed):
        return TcpGroup(master_address, master_port, rank_offset, world_size)

    with contextlib.ExitStack() as stack:
        jobs, behaviours = {}, {}
        for name, stage, more in (
            ("ddp", None, {}),
            ("zero3", 3, UNEVEN),
            ("fsdp2", "fsdp", {}),
            ("dies", 3, {"may_stop": True}),
        ):
            model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
            told = Behaviour(workers=1, joins=join, breaks_at=30 if name == "dies" else None)
            url, behaviours[name] = stack.enter_context(fake_vllm(model, tokenizer, told))
            engine, where = {"kind": "vllm", "url": url, "sync": "nccl", "max_retries": 0}, tmp_path / name
            jobs[name] = job(untied_student_dir, teacher_dir, where, stage, engine=engine, over_tcp=True, **more)
            if name != "dies":
                own = job(untied_student_dir, teacher_dir, tmp_path / f"{name}-own", stage, **more)
                jobs[f"{name}-own"] = own
        found = run_apart(jobs, tmp_path / "jobs")
    for name in ("ddp", "zero3", "fsdp2"):
        assert found[name][0]["losses"] == pytest.approx(found[f"{name}-own"][0]["losses"], rel=1e-3)
        assert [rank["groups"] for rank in found[name]] == [[2], []], "the first rank sends, and joins once for the run"
        assert [path for path, _, _ in behaviours[name].requests].count("/update_weights") == 3
    tensors = len(list(model.named_parameters()))
    assert tensors < 30 < 2 * tensors, "it dies in the second sync"
    for rank in found["dies"]:
        assert rank["steps"] == 1 and "failed while weights were sent" in rank["stopped"]


@pytest.mark.zero
@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP2"])
def test_a_sync_holds_a_layer_and_not_the_student(kind, tokenizer, teacher_dir, tmp_path):
    """Resident memory of two ranks above that before the sync, the first sync and one after a step."""
    student = save_tiny(tmp_path / "wide", hidden=512, layers=24, tied=False, scale=1.0)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    whole = sum(p.numel() * 4 for p in model.parameters())
    # As a plan writes them: at most two layers whole in a forward pass
    zero = {"stage3_prefetch_bucket_size": layer // 8, "stage3_max_live_parameters": layer // 2}
    how = {"stage": 3, "zero": zero} if kind == "ZeRO-3" else {"stage": "fsdp"}
    with contextlib.ExitStack() as stack:
        jobs = {}
        for sync in ("adapter", "reload"):
            url, _ = stack.enter_context(fake_vllm(copy.deepcopy(model), tokenizer, Behaviour()))
            told = {"engine": {"kind": "vllm", "url": url, "sync": sync}, "lora": sync == "adapter"}
            told |= {"watch_syncs": True, "steps": 2, "completion": 2}
            jobs[sync] = job(student, teacher_dir, tmp_path / sync, **how, **told)
        # What is freed goes back at once, so that what is resident is what is held
        found = run_apart(jobs, tmp_path, env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    print(
        f"{kind}: a layer has {layer / 1e6:.1f} MB, the student {whole / 1e6:.0f} MB; most above what was there before"
    )
    for sync, ranks in found.items():
        for number, rank in enumerate(ranks):
            assert len(rank["syncs"]) == 2
            most = {part: max(one[part] for one in rank["syncs"]) for part in ("write", "sync")}
            print(
                f"sync: {sync}, rank {number}: gathering and writing {most['write'] / 1e6:.0f} MB, all of it with the "
                f"probe {most['sync'] / 1e6:.0f} MB"
            )
            # A layer whole, its copy on the host and what becomes of that in the file, and one that is being gathered
            assert most["write"] < 5 * layer and most["sync"] < 6 * layer < 0.25 * whole, (kind, sync, number)
            assert sync == "reload" or most["write"] < layer, "of the frozen base nothing is gathered"


@pytest.mark.zero
def test_a_rank_whose_rows_call_fewer_tools_does_not_leave_the_others_waiting(
    untied_student_dir, teacher_dir, tokenizer, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
    with fake_vllm(model, tokenizer, Behaviour()) as (url, behaviour):
        engine = {"kind": "vllm", "url": url, "sync": "reload"}
        told = job(untied_student_dir, teacher_dir, tmp_path / "out", 3, engine=engine, tool_rounds=[[2, 1, 1], []])
        ranks = run_all({"tools": told}, tmp_path / "job")["tools"]
    assert [rank["steps"] for rank in ranks] == [3, 3]
    assert [path for path, _, _ in behaviour.requests].count("/collective_rpc") == 3, "once a step, not once a turn"


def test_no_more_than_a_layer_is_gathered_at_a_time():
    model = tiny_llama(tied=True, layers=6, hidden=64)
    groups = list(layer_by_layer(model))
    sizes = [sum(p.numel() for _, p in group) for group in groups]
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert max(sizes) == max(layer, model.lm_head.weight.numel())
    assert sum(sizes) == sum(p.numel() for p in model.parameters()), "each parameter once, a shared one too"
    assert sorted(name for group in groups for name, _ in group) == sorted(n for n, _ in model.named_parameters())
