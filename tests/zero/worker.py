"""One rank of a multi-rank job: trains with either method under a ZeRO stage, and reports what it held."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kd_plugin.errors import ServerError
from kd_plugin.sharding import close_process_group


def deepspeed_config(stage: int, **zero: object) -> dict:
    """Return the smallest configuration that runs on CPU.

    DeepSpeed keeps parameters below a threshold whole, which would be all of a tiny model: here it keeps none.
    """
    sharded = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    return {
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            **(sharded if stage == 3 else {}),
            **zero,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def host(job: dict) -> dict:
    """Return what a trainer's arguments say of the processes: DeepSpeed, FSDP2, or one alone."""
    state = {"accelerator_config": {"use_configured_state": True}}
    if job.get("fsdp"):
        return {**state, "fsdp": True, "fsdp_config": {"version": 2, **job["fsdp"]}}
    if job["stage"] is None:
        return {"use_cpu": True}
    return {**state, "deepspeed": deepspeed_config(job["stage"], **job.get("zero", {}))}


def arguments(job: dict, rank: int) -> dict:
    return {
        "output_dir": job["output_dir"],
        "max_steps": job.get("steps", 5),
        "per_device_train_batch_size": job.get("rows", 2),
        "gradient_accumulation_steps": job.get("accumulate", 1),
        "learning_rate": 1e-3,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
        **host(job),
        **job.get("arguments", {}),
    }


def teacher(name: str, told: str | dict):
    """Return a teacher of a job: a path, or what says its placement or its adapter."""
    from kd_plugin import AdapterTeacher, LocalTeacher, SelfTeacher, ServerTeacher

    if isinstance(told, str):
        return told
    if "self" in told:
        return SelfTeacher(told["self"], decay=0.5, name=name)
    if "url" in told:
        return ServerTeacher(**told, signal="hidden", name=name)
    if "adapter" in told:
        return AdapterTeacher(told["adapter"], base=told["base"], name=name, accept_base=True, license="own")
    return LocalTeacher(told["path"], dtype="float32", name=name, placement=told["placement"])


def build_panel(job: dict, args: dict):
    from datasets import Dataset

    from kd_plugin import TeacherPanel
    from kd_plugin.panel import Estimator, OwnTerms
    from kd_plugin.text.correction import CorrectionSettings
    from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
    from tests.hosts.runs import LORA, prompts
    from tests.text_teachers import ScriptedTeacher

    count = job.get("prompts", 48)
    columns = {}
    if job.get("routing"):
        names = list(job["teachers"] if "teachers" in job else args["panel"]["teachers"])
        chooser = random.Random(job["routing"])
        # Long runs of one teacher, so that some ranks hold no row for another
        columns["teacher_id"] = [chooser.choice(names) for _ in range(count)]
    if "panel" not in args:
        args.setdefault("combine", "route" if job.get("routing") else "weighted_kl")
    if job.get("given"):  # what the dataset answers, which is the same on any number of ranks
        columns["completion"] = [f" {'ab' * (i * 7 % 11)}c" for i in range(count)]
        args.setdefault("on_policy_fraction", 0.0)
    if job.get("text") is not None:
        columns["answer"] = [f"answer {i % 8}" for i in range(count)]
    kind = "plain"
    if job.get("hints"):  # conversations with a column that a view shows its teacher
        kind = "conversational"
        columns["hint"] = [f"It is {'so ' * (i * 5 % 7)}." for i in range(count)]
        if job.get("given"):
            columns["completion"] = [[{"role": "assistant", "content": text}] for text in columns["completion"]]
    data: Dataset = prompts(kind, count, **columns)
    config = TeacherPanelConfig(max_completion_length=job.get("completion", 8), temperature=1.0, **args)
    teachers: Any = {name: teacher(name, told) for name, told in job.get("teachers", {}).items()} or None
    if job.get("text") is not None:
        text = {"t": ScriptedTeacher(score=lambda case: float(case.row["answer"] not in job["wrong"]))}
        settings = CorrectionSettings(accept="teacher", **job["text"])
        teachers = TeacherPanel({**text, **(teachers or {})}, combine=args.pop("combine"), text=settings)
        config = TeacherPanelConfig(max_completion_length=job.get("completion", 8), temperature=1.0, **args)
    if job.get("estimators"):
        own = {name: OwnTerms(estimator=Estimator(estimator)) for name, estimator in job["estimators"].items()}
        teachers = TeacherPanel(teachers, combine=args.pop("combine"), own=own)
        config = TeacherPanelConfig(max_completion_length=job.get("completion", 8), temperature=1.0, **args)
    return TeacherPanelTrainer(
        model=job["student"],
        teacher_models=teachers,  # or args["panel"], a block as in YAML
        args=config,
        train_dataset=data,
        peft_config=LORA if job.get("lora") else None,
    )


def build_offline(job: dict, args: dict):
    from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
    from tests.hosts.runs import LORA

    config = OfflineKDConfig(teacher_cache=job["cache"], max_length=64, **args)
    return OfflineKDTrainer(model=job["student"], args=config, peft_config=LORA if job.get("lora") else None)


def main() -> None:
    """Run the job of a file, or its ``jobs`` one after another, and write a report for each beside it."""
    path = Path(sys.argv[1])
    told = json.loads(path.read_text())
    rank = int(os.environ["RANK"])
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    from tests.zero.counting import Counting

    jobs = told.get("jobs", {"": told})
    counting = Counting() if any(job.get("count") for job in jobs.values()) else None  # before DeepSpeed starts
    if not any(job.get("fsdp") for job in jobs.values()):
        PartialState(backend="gloo")
    for name, job in jobs.items():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(job.get("stage") is not None).lower()
        if job.get("fsdp"):
            start_fsdp()
        report = train(job, rank, counting if job.get("count") else None)
        path.with_name(f"rank{rank}{name and '-' + name}.json").write_text(json.dumps(report))
        AcceleratorState._reset_state()
        GradientState._reset_state()
        gc.collect()


def start_fsdp() -> None:
    """Start gloo on CPU ranks, and tell accelerate that they are GPUs: it looks at FSDP on no other kind of rank.

    The kind is all that is pretended. The plugin, the cutting, the gathering and the collectives are the real ones.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def call_tools(trainer, rounds: list[int]) -> None:
    """Stand for a tool loop in which this rank generates anew once for each of ``rounds``, for so many rows."""
    from trl import DistillationTrainer

    def loop(self, prompts, prompt_ids, completion_ids, completions, images, multimodal_fields):
        for rows in rounds:
            assert len(self._generate_single_turn(prompt_ids[:rows], None, {})) == rows
        return [[1] * len(ids) for ids in completion_ids], completions, completion_ids, 0, 0, []

    DistillationTrainer._tool_call_loop = loop
    trainer.tools = [print]


@contextmanager
def noting_gatherings() -> Iterator[list[list[int]]]:
    """Note which sharded parameters are opened by hand, one list a gathering: all ranks must do it alike."""
    from kd_plugin import sharding

    found: list[list[int]] = []
    inner = sharding.gathering

    def noted(parameters):
        parameters = list(parameters)
        found.append([p.ds_id for p in parameters if hasattr(p, "ds_id")])
        return inner(parameters)

    sharding.gathering = noted
    try:
        yield found
    finally:
        sharding.gathering = inner


def train(job: dict, rank: int, counting) -> dict:
    from tests.zero.sync_memory import watching_syncs

    with noting_gatherings() as gatherings, watching_syncs() if job.get("watch_syncs") else nullcontext() as syncs:
        return {**run_job(job, rank, counting), "gatherings": gatherings, "syncs": syncs}


def run_job(job: dict, rank: int, counting) -> dict:
    args = arguments(job, rank)
    groups = send_over_tcp() if job.get("over_tcp") else []
    trainer = (build_panel if job["method"] == "panel" else build_offline)(job, args)
    if job.get("tool_rounds"):
        call_tools(trainer, job["tool_rounds"][rank])
    if job.get("die_at") and rank == job.get("die_rank", 1):
        from transformers import TrainerCallback

        class Die(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == job["die_at"]:
                    Path(job["die_file"]).write_text(str(time.time()))
                    os._exit(9)

        trainer.add_callback(Die())
    if counting is not None:
        counting.attach(trainer)
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except ServerError as error:
        if not job.get("may_stop"):
            raise
        return {"stopped": str(error), "steps": trainer.state.global_step}
    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "norm": weight_norm(trainer),
        "groups": groups,
        "parity": [entry["rollouts/parity"] for entry in trainer.state.log_history if "rollouts/parity" in entry],
    }
    if job["method"] == "panel":
        report["sharded"] = [name for name, teacher in trainer.panel.teachers.items() if teacher.capabilities.sharded]
    if counting is not None:
        report |= counting.report()
    if job.get("save"):
        trainer.save_model(job["save"])
    return report


def send_over_tcp() -> list[int]:
    """Have ``sync: nccl`` send through a TCP store, which needs no GPU; note the members of each group opened here."""
    from kd_plugin.rollouts.vllm import engine, transfer
    from tests.tcp_group import TcpGroup

    opened: list[int] = []

    def open_group(address: str, port: int, members: int) -> TcpGroup:
        opened.append(members)
        return TcpGroup(address, port, 0, members)

    transfer.open_group = open_group
    engine.require_gpu = lambda device: None
    return opened


@torch.no_grad()
def weight_norm(trainer) -> float:
    """Return the sum of the trained weights' squares, gathered where they are sharded."""
    from kd_plugin.sharding import gathered_tensor

    total = 0.0
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                total += float((parameter.double() ** 2).sum())
        else:
            total += float((gathered_tensor(parameter).double() ** 2).sum())
    return total


if __name__ == "__main__":
    main()
    close_process_group()
