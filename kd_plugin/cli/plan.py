"""``kd-plugin plan``: whether a run fits, with which settings, at which price, and the files that launch it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd_plugin.cli.config import as_yaml, parse_settings
from kd_plugin.errors import ConfigError
from kd_plugin.zero.architectures import architecture
from kd_plugin.zero.cluster import Cluster
from kd_plugin.zero.communication import traffic
from kd_plugin.zero.cost import bills, break_even
from kd_plugin.zero.fitting import Option, options, recommended
from kd_plugin.zero.run import GIB, PlannedRun, parse_teacher
from kd_plugin.zero.writers import write_all

_DESCRIPTION = """\
Says before you rent machines whether a student and its teachers fit, for each ZeRO stage and offload, recommends the
fastest that does, and with --output writes the files that launch it. Architectures are read from a config.json or
known by name; no network, no GPU and no weights are needed. Exit codes: 0 something fits, 3 nothing does.
"""
EXIT_NOTHING_FITS = 3
_PARTS = ("weights", "gradients", "optimizer", "teachers", "activations", "loss", "hidden", "gathered", "buckets")


@dataclass(frozen=True)
class PlanSettings:
    """What to plan.

    Attributes:
        student: a known name such as Qwen/Qwen2.5-32B, a config.json, or a directory with one.
        method: offline or panel.
        teachers: MODEL:PLACEMENT each; placements are sharded, resident, offload, adapter, server and cached.
        lora_rank: 0 trains the full student.
        lora_targets: linear layers that get an adapter; empty takes all but the head.
        combine: route asks one teacher a row; weighted_kl, mixture and confidence ask all.
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
        api_input: price of a million prompt tokens of a metered API; 0 leaves the comparison out.
        api_output: price of a million completion tokens.
        output: directory for the DeepSpeed JSON, Accelerate YAML, LightningCLI fragment and launch commands.
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
    api_input: float = 0.0
    api_output: float = 0.0
    output: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    flags = {"json": "print the plan as JSON, all figures in bytes, seconds and GPU hours"}
    parsed = parse_settings(PlanSettings, argv, command="plan", description=_DESCRIPTION, flags=flags)
    settings = parsed.settings
    if parsed.print_only:
        print(as_yaml(settings))
        return 0
    run, cluster = planned(settings)
    found = options(run, cluster)
    best = recommended(found)
    if "json" in parsed.flags:
        print(json.dumps(as_json(settings, run, cluster, found, best), indent=2))
    else:
        _print(settings, run, cluster, found, best)
    if best is not None and settings.output is not None:
        written = write_all(best.run, best.layout, cluster, Path(settings.output), settings.nvme_path)
        if "json" not in parsed.flags:
            print("Written: " + ", ".join(map(str, written)))
    return 0 if best is not None else EXIT_NOTHING_FITS


def planned(settings: PlanSettings) -> tuple[PlannedRun, Cluster]:
    """Turn settings into a run and machines.

    Raises:
        ConfigError: an unknown model, a contradiction, or no student.
    """
    if not settings.student:
        raise ConfigError("no student is named; set --student to a known name, a config.json, or a directory with one.")
    run = PlannedRun(
        student=architecture(settings.student, lora_rank=settings.lora_rank, lora_targets=tuple(settings.lora_targets)),
        method=settings.method,  # type: ignore[arg-type]
        teachers=tuple(parse_teacher(text) for text in settings.teachers),
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        prompt_length=settings.prompt_length,
        completion_length=settings.completion_length,
        precision=settings.precision,  # type: ignore[arg-type]
        divergences_on_all=settings.combine != "route",
        divergence=settings.divergence,
        listed=settings.listed,
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


def as_json(
    settings: PlanSettings, run: PlannedRun, cluster: Cluster, found: Sequence[Option], best: Option | None
) -> dict[str, Any]:
    """Return the plan for programs: bytes, seconds, GPU hours."""
    return {
        "settings": dataclasses.asdict(settings),
        "student": {"parameters": run.student.total, "trainable": run.student.trainable},
        "ranks": cluster.ranks,
        "usable_bytes": cluster.usable,
        "options": [_option(option, cluster) for option in found],
        "recommended": None if best is None else best.layout.name,
        "bills": [dataclasses.asdict(bill) | {"hours": bill.hours} for bill in _bills(settings, run, cluster)],
        "break_even": _break_even(settings, run, cluster),
    }


def _option(option: Option, cluster: Cluster) -> dict[str, Any]:
    return {
        "name": option.layout.name,
        **dataclasses.asdict(option.layout),
        "memory": option.memory.to_json(),
        "gather_for_generation": option.run.gather_for_generation,
        "seconds": {**dataclasses.asdict(option.seconds), "total": option.seconds.total},
        "sent_bytes": traffic(option.run, option.layout.stage, cluster.ranks).total,
        "fits": option.fits,
        "verdict": option.verdict,
    }


def _bills(settings: PlanSettings, run: PlannedRun, cluster: Cluster) -> Sequence[Any]:
    """Return the bills; that of a panel only where there are teachers to pay for."""
    return [b for b in bills(run, cluster, settings.rows, settings.epochs) if b.method == "offline" or run.teachers]


def _break_even(settings: PlanSettings, run: PlannedRun, cluster: Cluster) -> dict[str, Any] | None:
    if not (settings.api_input or settings.api_output):
        return None
    result = break_even(run, cluster, input_price=settings.api_input, output_price=settings.api_output)
    return None if result is None else dataclasses.asdict(result)


def _print(
    settings: PlanSettings, run: PlannedRun, cluster: Cluster, found: Sequence[Option], best: Option | None
) -> None:
    console = Console(highlight=False)
    student = run.student
    console.print(
        f"{student.name}: {student.total / 1e9:.2f} B parameters, {student.trainable / 1e9:.3g} B trained; "
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.memory_gib:.0f} GiB, "
        f"{cluster.usable / GIB:.1f} can be used. GiB on each GPU:"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("layout")
    for part in (*_PARTS, "generation", "peak", "host", "s/step"):
        table.add_column(part, justify="right", no_wrap=True)
    for option in found:
        held = option.memory.to_json()
        cells = [f"{held[part] / GIB:.1f}" for part in (*_PARTS, "generation", "peak", "host")]
        style = "bold green" if option is best else "" if option.fits else "dim"
        table.add_row(option.layout.name, *cells, f"{option.seconds.total:.0f}", style=style)
    Console(highlight=False, width=max(console.width, 170)).print(table)
    _print_bars(console, found, best, cluster)
    for bill in _bills(settings, run, cluster):
        console.print(
            f"{bill.method}: {settings.rows} rows, {settings.epochs:g} epochs: teachers {bill.teacher_hours:.0f} and "
            f"student {bill.student_hours:.0f} GPU hours, {bill.price:,.0f} at {cluster.price:g} an hour."
        )
    even = _break_even(settings, run, cluster)
    if even is not None:
        when = "never" if even["tokens"] is None else f"from {even['tokens']:.1f} million completion tokens on"
        console.print(
            f"A million completion tokens: {even['own_per_million']:.2f} on own GPUs, {even['api_per_million']:.2f} "
            f"from the API; own GPUs are cheaper {when}."
        )
    if best is None:
        nearest = min(found, key=lambda option: option.memory.peak)
        console.print(f"Nothing fits. Nearest: {nearest.layout.name}: {nearest.verdict}.", style="bold red")
        console.print("More GPUs, a shorter completion, LoRA, or teachers on a server or in a cache take less.")
        return
    console.print(f"Recommended: {best.layout.name}; most of a step is to {best.seconds.bound}.", style="bold")
    if best.layout.stage == 3 and not best.run.gather_for_generation:
        console.print(
            "Whole weights do not fit beside the rest while the student writes: layers are gathered anew for every "
            "token (ds3_gather_for_generation=False). That is slow and can look like a hang. Let vLLM write "
            "(use_vllm), or choose offline KD."
        )


def _print_bars(console: Console, found: Sequence[Option], best: Option | None, cluster: Cluster) -> None:
    """Draw each layout's peak against what a GPU has."""
    width = 50
    most = max(max(option.memory.peak for option in found), cluster.usable)
    limit = int(width * cluster.usable / most)
    for option in found:
        length = max(1, int(width * option.memory.peak / most))
        bar = "█" * length + " " * (width - length)
        bar = bar[:limit] + "|" + bar[limit:]
        mark = "fits, recommended" if option is best else "fits" if option.fits else option.verdict
        name = f"{option.layout.name[:48]:<48}"
        console.print(f"{name} {bar} {mark}", style="green" if option.fits else "dim", soft_wrap=True)
