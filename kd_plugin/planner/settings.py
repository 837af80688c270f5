"""Settings of a plan, and the run, machines and engines that they describe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kd_plugin.errors import UsageError
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.run import Cluster, PlannedRun, parse_teacher
from kd_plugin.planner.time import Engines


@dataclass(frozen=True)
class PlanSettings:
    """What to plan.

    Attributes:
        student: a known name such as Qwen/Qwen2.5-32B, a config.json, or a directory with one.
        method: offline or panel.
        teachers: MODEL:PLACEMENT each; placements are sharded, resident, offload, adapter, server and cached.
        lora_rank: 0 trains the full student.
        lora_targets: linear layers that get an adapter; empty takes all but the head.
        combine: how teachers are combined; route asks one teacher a row, the others ask all.
        divergence: decides which buffers the loss needs.
        prompt_length: tokens of a prompt.
        completion_length: tokens of a completion.
        micro_batch: rows in a forward pass of one GPU.
        accumulation: micro-batches in a step.
        precision: bf16 or fp32.
        listed: target tokens a position, for offline KD.
        nodes: number of nodes.
        gpus_per_node: GPUs in each.
        gpu_memory: GiB of a GPU.
        host_memory: GiB of a node's main memory.
        nvme: GiB of a node's local disk; 0 rules NVMe offload out.
        nvme_path: where that disk is mounted.
        tflops: dense bf16 peak of a GPU.
        utilization: share of the peak that training reaches.
        between_nodes: GB/s that a GPU sends to other nodes.
        gpu_hour: price of a GPU hour.
        rows: prompts in the training set, for the bill.
        epochs: how often each is seen.
        text_teachers: teachers that correct by text, name to prices of a million tokens, `{read: X, written: Y}`.
        corrected: share of the student's responses that fall short, and that text teachers correct.
        voted: whether a majority of the other text teachers accepts a correction, and not a verifier.
        api_input: price of a million prompt tokens of a metered API; 0 leaves the comparison out.
        api_output: price of a million completion tokens.
        engine_gpus: GPUs of vLLM engines that generate for the student, beside those that train; 0 generates there.
        server_gpus: GPUs of servers whose teacher scores every row, beside those that train.
        server_active: billions of parameters of that teacher that a token passes through.
        server_width: width of its hidden states.
        max_staleness: optimizer steps that the engines may be ahead.
        network: GB/s that reach a trainer's node from servers.
        disk: GB/s of the directory through which weights reach the engines.
        plot: PNG file for the chart of each layout's peak, part by part; needs the extra `plots`.
        output: directory for the DeepSpeed JSON, Accelerate YAML, LightningCLI fragment and launch commands; with
            engine_gpus also the Slurm script and the Kubernetes manifest that start engines, servers and trainers.
    """

    student: str = ""
    method: str = "panel"
    teachers: list[str] = field(default_factory=list)
    lora_rank: int = 0
    lora_targets: list[str] = field(default_factory=list)
    combine: str = "route"
    divergence: str = "reverse_kl"
    prompt_length: int = 512
    completion_length: int = 4096
    micro_batch: int = 1
    accumulation: int = 8
    precision: str = "bf16"
    listed: int = 64
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    host_memory: float = 1800.0
    nvme: float = 0.0
    nvme_path: str = "/local_nvme"
    tflops: float = 989.0
    utilization: float = 0.4
    between_nodes: float = 50.0
    gpu_hour: float = 2.5
    rows: int = 100_000
    epochs: float = 1.0
    text_teachers: dict[str, Any] = field(default_factory=dict)
    corrected: float = 0.5
    voted: bool = True
    api_input: float = 0.0
    api_output: float = 0.0
    engine_gpus: int = 0
    server_gpus: int = 0
    server_active: float = 0.0
    server_width: int = 0
    max_staleness: int = 1
    network: float = 3.0
    disk: float = 2.0
    plot: str | None = None
    output: str | None = None


def planned(settings: PlanSettings) -> tuple[PlannedRun, Cluster]:
    """Turn settings into a run and machines.

    Raises:
        ConfigError: an unknown model, a contradiction, or no student (UsageError).
    """
    if not settings.student:
        raise UsageError("no student is named; set --student to a known name, a config.json, or a directory with one.")
    run = PlannedRun(
        student=architecture(settings.student, lora_rank=settings.lora_rank, lora_targets=tuple(settings.lora_targets)),
        method=settings.method,  # type: ignore[arg-type]
        teachers=tuple(
            parse_teacher(text) for text in (*settings.teachers, *(f"{name}:server" for name in settings.text_teachers))
        ),
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        prompt_length=settings.prompt_length,
        completion_length=settings.completion_length,
        precision=settings.precision,  # type: ignore[arg-type]
        combine=settings.combine,  # type: ignore[arg-type]
        divergence=settings.divergence,
        listed=settings.listed,
        generates=settings.engine_gpus == 0,
    )
    cluster = Cluster(
        nodes=settings.nodes,
        gpus_per_node=settings.gpus_per_node,
        memory_gib=settings.gpu_memory,
        host_gib=settings.host_memory,
        nvme_gib=settings.nvme,
        tflops=settings.tflops,
        utilization=settings.utilization,
        between=settings.between_nodes * 1e9,
        price=settings.gpu_hour,
    )
    return run, cluster


def engines_of(settings: PlanSettings) -> Engines | None:
    """Return the GPUs beside those that train; None where there are none.

    Raises:
        ConfigError: they make no whole engine, or a server's teacher has no size.
    """
    if not settings.engine_gpus:
        return None
    return Engines(
        settings.engine_gpus,
        settings.server_gpus,
        settings.server_active * 1e9,
        settings.server_width,
        settings.network * 1e9,
        settings.disk * 1e9,
        settings.max_staleness,
    )
