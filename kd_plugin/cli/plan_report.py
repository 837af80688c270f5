"""What ``kd-plugin plan`` shows people: a table, a bar chart in text and as PNG, the bills, the recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kd_plugin.zero.cluster import Cluster
from kd_plugin.zero.cost import Bill, BreakEven
from kd_plugin.zero.fitting import Option
from kd_plugin.zero.run import GIB, PlannedRun

# Columns of the table: what each part of Memory is called there
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "gradients_peak": "at peak",
    "optimizer": "optimizer",
    "teachers": "teachers",
    "activations": "activations",
    "loss": "loss",
    "hidden": "hidden",
    "gathered": "gathered",
    "buckets": "buckets",
    "generation": "whole to write",
    "kv_cache": "KV cache",
    "peak": "peak",
    "host": "host",
}
# What meets at the peak of training, bottom to top of a bar
_TRAINING = (
    "weights",
    "optimizer",
    "gradients_peak",
    "teachers",
    "activations",
    "loss",
    "hidden",
    "gathered",
    "buckets",
)
# And at the peak of writing completions
_WRITING = ("weights", "optimizer", "gradients", "teachers", "generation", "kv_cache", "buckets")


def print_plan(
    run: PlannedRun,
    cluster: Cluster,
    found: Sequence[Option],
    best: Option | None,
    bills: Sequence[Bill],
    even: BreakEven | None,
    rows: int,
    epochs: float,
) -> None:
    """Print the plan.

    Args:
        run: what was planned.
        cluster: for which machines.
        found: every layout, judged.
        best: the recommended one of them; None where nothing fits.
        bills: of offline KD, and of the panel where there is one.
        even: own GPUs against a metered API; None leaves it out.
        rows: prompts that the bills are for.
        epochs: how often each is seen.
    """
    console = Console(highlight=False)
    console.print(f"{_title(run, cluster)}. GiB on each GPU:")
    table = Table(box=None, pad_edge=False)
    table.add_column("layout")
    for title in (*_PARTS.values(), "s/step"):
        table.add_column(title, justify="right")
    for option in found:
        held = option.memory.to_json()
        cells = [f"{held[part] / GIB:.1f}" for part in _PARTS]
        style = "bold green" if option is best else "" if option.fits else "dim"
        table.add_row(option.layout.name, *cells, f"{option.seconds.total:.0f}", style=style)
    Console(highlight=False, width=max(console.width, 190)).print(table)
    _print_bars(console, found, best, cluster)
    for bill in bills:
        console.print(
            f"{bill.method}: {rows} rows, {epochs:g} epochs: teachers {bill.teacher_flops:.2e} and student "
            f"{bill.student_flops:.2e} FLOPs; teachers {bill.teacher_hours:.0f} and student {bill.student_hours:.0f} "
            f"GPU hours, {bill.price:,.0f} at {cluster.price:g} an hour."
        )
    if even is not None:
        when = "never" if even.tokens is None else f"from {even.tokens:.1f} million completion tokens on"
        console.print(
            f"A million completion tokens: {even.own_per_million:.2f} on own GPUs, {even.api_per_million:.2f} "
            f"from the API; own GPUs are cheaper {when}."
        )
    _print_advice(console, found, best)


def plot_peaks(run: PlannedRun, cluster: Cluster, found: Sequence[Option], best: Option | None, path: Path) -> None:
    """Draw each layout's peak as a bar of its parts, with the line up to which a GPU can be filled; writes a PNG.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra ``plots``, is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.36 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    names = [option.layout.name + (" (recommended)" if option is best else "") for option in found]
    left = [0.0] * len(found)
    shown = [dict.fromkeys(_TRAINING if o.memory.training >= o.memory.writing else _WRITING) for o in found]
    for part in dict.fromkeys((*_TRAINING, *_WRITING)):
        widths = [
            option.memory.to_json()[part] / GIB if part in parts else 0.0
            for option, parts in zip(found, shown, strict=True)
        ]
        if any(widths):
            label = (
                "gradients" if part == "gradients_peak" else "gradients held" if part == "gradients" else _PARTS[part]
            )
            axes.barh(names, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(cluster.usable / GIB, color="black", linestyle="--", label="can be used")
    axes.invert_yaxis()
    axes.set_xlabel("GiB on each GPU at the peak")
    figure.suptitle(_title(run, cluster), fontsize="medium")
    axes.legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def _title(run: PlannedRun, cluster: Cluster) -> str:
    student = run.student
    return (
        f"{student.name}: {student.total / 1e9:.2f} B parameters, {student.trainable / 1e9:.3g} B trained; "
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.memory_gib:.0f} GiB, "
        f"{cluster.usable / GIB:.1f} can be used"
    )


def _print_advice(console: Console, found: Sequence[Option], best: Option | None) -> None:
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
