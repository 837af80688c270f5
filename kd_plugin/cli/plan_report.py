"""What ``kd-plugin plan`` shows people: a table, a bar chart in text and as PNG, the bills, the recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kd_plugin.planner.cost import Bill, BreakEven, Option, TextBill
from kd_plugin.planner.engines import Engines, best_split, engine_step
from kd_plugin.planner.run import GIB, Cluster, Pair, PlannedRun

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
    "generation": "gathered to generate",
    "kv_cache": "KV cache",
    "peak": "peak",
    "host": "host",
}
_CHOSEN = "fits, recommended"
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


# Columns where the table of all parts is wider than the terminal, and what of Memory each adds up
_BRIEF = {
    "weights": ("weights",),
    "grads": ("gradients_peak",),
    "optim.": ("optimizer",),
    "teach.": ("teachers",),
    "peak": ("peak",),
    "host": ("host",),
}


def print_plan(
    run: PlannedRun,
    cluster: Cluster,
    found: Sequence[Option],
    best: Option | None,
    pairs: Sequence[Pair],
    bills: Sequence[Bill],
    even: BreakEven | None,
    rows: int,
    epochs: float,
) -> None:
    """Print the plan, the recommendation first, no wider than the terminal.

    Args:
        run: what was planned.
        cluster: for which machines.
        found: every layout, with whether it fits.
        best: the recommended one of them; None where nothing fits, or where training would refuse a teacher.
        pairs: each teacher beside the student.
        bills: of offline KD, and of the panel where there is one.
        even: own GPUs against a metered API; None leaves it out.
        rows: prompts that the bills are for.
        epochs: how often each is seen.
    """
    console = Console(highlight=False)
    _print_advice(console, found, best, pairs)
    if not pairs:
        console.print("No teacher is named, so neither its tokens nor its terms were checked.")
    for pair in pairs:
        console.print(f"{pair}", markup=False, style="bold red" if pair.refused else "")
    console.print(f"{_title(run, cluster)}. GiB on each GPU:", markup=False)
    whole = _table(found, best, {title: (part,) for part, title in _PARTS.items()})
    fits = Console(width=1000).measure(whole).maximum <= console.width
    console.print(whole if fits else _table(found, best, _BRIEF))
    console.print(_bars(found, best, cluster, console.width))
    for bill in bills:
        capture = f", and {bill.teacher_hours:,.0f} of the capture" if bill.method == "offline" else ""
        console.print(
            f"{bill.method}: {rows} rows, {epochs:g} epochs under {bill.layout}: {bill.steps:,.0f} steps of "
            f"{bill.step_seconds:,.1f} s on {bill.gpus} GPUs ({bill.tokens_per_second:,.0f} tokens/s){capture}; "
            f"teachers {bill.teacher_flops:.2e} and student {bill.student_flops:.2e} FLOPs; {bill.hours:,.0f} GPU "
            f"hours, {bill.price:,.0f} at {cluster.price:g} an hour.",
            markup=False,
        )
    away = [teacher.name for teacher in run.teachers if teacher.placement in ("server", "cached")]
    if away:
        console.print(f"Not in the bills: what serves or filled {', '.join(away)}.", markup=False)
    if even is not None:
        when = "never" if even.tokens is None else f"from {even.tokens:.1f} million completion tokens on"
        console.print(
            f"A million completion tokens: {even.own_per_million:.2f} on own GPUs, {even.api_per_million:.2f} "
            f"from the API; own GPUs are cheaper {when}."
        )


def print_engines(best: Option, cluster: Cluster, beside: Engines) -> None:
    """Print what a step takes on engines, servers and trainers, and how the GPUs beside the trainers are best shared.

    Args:
        best: the recommended layout of the trainers.
        cluster: they train on.
        beside: the other GPUs.
    """
    console = Console(highlight=False)
    step = engine_step(best.run, best.seconds, cluster, beside)
    console.print(
        f"With {beside.student_gpus} GPUs of engines and {beside.server_gpus} of servers beside {cluster.ranks} that "
        f"train: generate {step.generate:,.0f} s, sync {step.sync:,.0f} s, score {step.score:,.0f} s, transfer "
        f"{step.transfer:,.0f} s, train {step.train:,.0f} s; a step of {step.total:,.0f} s with "
        f"max_staleness={beside.staleness}."
    )
    split = best_split(best.run, best.seconds, cluster, beside)
    if split != beside:
        better = engine_step(best.run, best.seconds, cluster, split).total
        console.print(
            f"Shared as {split.student_gpus} and {split.server_gpus} the same GPUs give a step of {better:,.0f} s."
        )
    console.print(
        "Files that start all parts: integrations/slurm/panel_with_engines.sbatch and "
        "integrations/kubernetes/panel_with_engines.yaml."
    )


def print_text_bills(bills: Sequence[TextBill], corrected: float) -> None:
    """Print what teachers that correct by text read, write and cost."""
    console = Console(highlight=False)
    for bill in bills:
        console.print(
            f"text teacher {bill.teacher}: reads {bill.read / 1e6:,.1f} and writes {bill.written / 1e6:,.1f} million "
            f"tokens if it corrects {corrected:.0%} of the responses; {bill.price:,.2f} by its prices.",
            markup=False,
        )


def _table(found: Sequence[Option], best: Option | None, columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("layout", overflow="fold", min_width=16)
    for title in (*columns, "s/step", "fits"):
        table.add_column(title, justify="right", no_wrap=True)
    for option in found:
        held = option.memory.to_json()
        cells = [f"{sum(held[part] for part in parts) / GIB:.1f}" for parts in columns.values()]
        style = "bold green" if option is best else "" if option.fits else "dim"
        fits = "yes" if option.fits else "no"
        table.add_row(option.layout.name, *cells, f"{option.seconds.total:.0f}", fits, style=style)
    return table


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


def _print_advice(console: Console, found: Sequence[Option], best: Option | None, pairs: Sequence[Pair]) -> None:
    refused = [pair.teacher for pair in pairs if pair.refused]
    if refused:
        console.print(
            f"Training refuses {', '.join(refused)} as a teacher of this student; nothing is recommended.",
            style="bold red",
            markup=False,
        )
        return
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


def _bars(found: Sequence[Option], best: Option | None, cluster: Cluster, width: int) -> Table:
    """Draw each layout's peak against what a GPU has."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold", max_width=max(16, width // 4))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", min_width=len(_CHOSEN))
    length = max(10, width - max(16, width // 4) - max(len(_CHOSEN), width // 4) - 3)
    most = max(max(option.memory.peak for option in found), cluster.usable)
    limit = int(length * cluster.usable / most)
    for option in found:
        filled = max(1, int(length * option.memory.peak / most))
        bar = "█" * filled + " " * (length - filled)
        bar = bar[:limit] + "|" + bar[limit:]
        over = f"{option.memory.peak / GIB:.1f} of {cluster.usable / GIB:.1f} GiB"
        lacking = over if option.memory.peak > cluster.usable else option.verdict
        mark = _CHOSEN if option is best else "fits" if option.fits else lacking
        table.add_row(option.layout.name, bar, mark, style="green" if option.fits else "dim")
    return table
