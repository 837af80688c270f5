"""What ``kd-plugin plan`` shows people: a table, a bar chart in text and as PNG, the bills, the recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kd_plugin.planner.cost import Bill, BreakEven, Option, TextBill
from kd_plugin.planner.run import GIB, Cluster, Pair, PlannedRun
from kd_plugin.planner.time import Engines, best_split, engine_step, gpu_hours

_BEYOND = 1.6  # how far beyond what fits the chart goes
_DARK, _DIM = "#1f2328", "#59636e"
_COLOURS = (
    "#4269d0", "#a463f2", "#ff725c", "#efb118", "#3ca951", "#6cc5b0", "#97bbf5", "#9c6b4e", "#9498a0", "#ff8ab7",
    "#0b7285", "#d0bfff", "#ffd8a8",
)  # fmt: skip
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
    hours = gpu_hours(step, cluster, beside)
    console.print(
        f"With {beside.student_gpus} GPUs of engines and {beside.server_gpus} of servers beside {cluster.ranks} that "
        f"train: generate {step.generate:,.0f} s, sync {step.sync:,.0f} s, score {step.score:,.0f} s, transfer "
        f"{step.transfer:,.0f} s, train {step.train:,.0f} s; a step of {step.total:,.0f} s with "
        f"max_staleness={beside.staleness}, {hours:,.2f} GPU hours or {hours * cluster.price:,.2f} in money."
    )
    split = best_split(best.run, best.seconds, cluster, beside)
    if split != beside:
        better = engine_step(best.run, best.seconds, cluster, split).total
        console.print(
            f"Shared as {split.student_gpus} and {split.server_gpus} the same GPUs give a step of {better:,.0f} s."
        )
    console.print("--output DIR also writes a Slurm script and a Kubernetes manifest that start all of these parts.")


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
    """Draw each layout's peak as a bar of its parts, what fits first; writes a PNG.

    The limit of a GPU is a line. What does not fit is drawn small below it, and cut off where it goes far beyond.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra ``plots``, is missing.
    """
    from matplotlib.figure import Figure

    fitting = sorted((o for o in found if o.fits), key=lambda o: (o is not best, o.seconds.total))
    ordered = [*fitting, *sorted((o for o in found if not o.fits), key=lambda o: o.memory.peak)]
    limit = cluster.usable / GIB
    most = max([limit, *(o.memory.peak / GIB for o in fitting)])
    edge = min(max(o.memory.peak / GIB for o in ordered), _BEYOND * most)
    steps = [1.0 if option.fits else 0.55 for option in ordered]
    places = [sum(steps[:k]) + steps[k] / 2 for k in range(len(steps))]
    figure = Figure(figsize=(11, 2.0 + 0.4 * sum(steps)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(ordered)
    shown = [dict.fromkeys(_TRAINING if o.memory.training >= o.memory.writing else _WRITING) for o in ordered]
    for part, colour in zip(dict.fromkeys((*_TRAINING, *_WRITING)), _COLOURS, strict=False):
        widths = [
            option.memory.to_json()[part] / GIB if part in parts else 0.0
            for option, parts in zip(ordered, shown, strict=True)
        ]
        if any(widths):
            label = {"gradients_peak": "gradients", "gradients": "gradients held"}.get(part, _PARTS[part])
            drawn = [max(0.0, min(edge, a + w) - a) for a, w in zip(left, widths, strict=True)]
            bars = axes.barh(places, drawn, height=[0.72 * s for s in steps], left=left, label=label, color=colour)
            for bar, option in zip(bars, ordered, strict=True):
                bar.set_alpha(1.0 if option.fits else 0.35)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(limit, color="#cf222e", linewidth=1.5)
    axes.text(limit, 0, f" {limit:.1f} GiB can be used", color="#cf222e", va="bottom", fontsize=9)
    for option, place, whole in zip(ordered, places, left, strict=True):
        why = option.verdict if not option.fits and whole <= limit else ""
        more = " →" if whole > edge else "  recommended" if option is best else f"  {why}" if why else ""
        size, colour = (9, _DARK) if option.fits else (7, _DIM)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        written = axes.text(min(whole, edge) * 1.004, place, f"{whole:.0f} GiB{more}", va="center", bbox=box)
        written.set(fontsize=size, color=colour, fontweight="bold" if option is best else "normal")
    axes.set_yticks(places, [option.layout.name for option in ordered])
    for tick, option in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set(fontsize=9 if option.fits else 7, color=_DARK if option.fits else _DIM)
        tick.set_fontweight("bold" if option is best else "normal")
    axes.set(xlim=(0, edge * 1.14), ylim=(sum(steps), -0.1), xlabel="GiB on each GPU at the peak")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(run, cluster), fontsize="medium")
    figure.legend(fontsize="small", loc="outside lower center", ncols=6, frameon=False)
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
            "Whole weights do not fit beside the rest while the student generates: layers are gathered anew for every "
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
