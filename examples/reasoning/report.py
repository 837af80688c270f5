"""What the trainings reached, as tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoModelForCausalLM

from examples.reasoning.methods import COMPLETIONS, METHODS
from examples.reasoning.models import ROWS
from kd_plugin.cache.manifest import read_manifest
from kd_plugin.evaluation.cost import operations
from kd_plugin.evaluation.decisions import accuracy, compare_all
from kd_plugin.evaluation.results import load_evaluation, shares_of
from kd_plugin.evaluation.statistics import pass_at

TASKS = ("short", "middle", "long", "long_cool")


@dataclass(frozen=True)
class Run:
    """What a training reached.

    Attributes:
        method: its name.
        start: updates of the student before.
        learning_rate: of the training.
        seed: of the training.
        points: at each evaluation the ``updates``, the ``flops`` of student and teacher with captures, and of each
            task the share of right answers to each question.
    """

    method: str
    start: int
    learning_rate: float
    seed: int
    points: list[dict[str, Any]]

    @classmethod
    def read(
        cls,
        directory: Path,
        *,
        method: str,
        capture: Path | None,
        rows: int,
        teacher: Path,
        start_model: Path,
        **job: Any,
    ) -> Run:  # fmt: skip
        """Read the evaluations of a training.

        Args:
            directory: of the training.
            method: its name.
            capture: what it fitted.
            rows: of the capture that it read.
            teacher: directory of the teacher.
            start_model: directory of the student's start.
            **job: the other attributes.
        """
        row = 0.0 if capture is None else _row_flops(method, capture, teacher, start_model)
        points = []
        for place in sorted((directory / "evaluations").glob("step-*"), key=lambda one: int(one.name[5:])):
            evaluation, updates = load_evaluation(place), int(place.name[5:])
            assert evaluation.cost is not None
            shares = {task: list(shares_of(place / task)) for task in TASKS}
            flops = evaluation.cost.flops + min(updates * ROWS, rows) * row
            points.append({"updates": updates, "flops": flops, "shares": shares})
        return cls(method, points=points, **job)

    def last(self, task: str) -> float:
        """Return the accuracy of the last evaluation."""
        return fmean(self.points[-1]["shares"][task])

    def at(self, updates: int) -> dict[str, Any]:
        """Return the point with so many updates."""
        return next(point for point in self.points if point["updates"] == updates)

    def curve(self, by: str, task: str = "long") -> tuple[list[float], list[float]]:
        """Return its accuracies by ``updates`` or ``flops``."""
        return [point[by] for point in self.points], [fmean(point["shares"][task]) for point in self.points]


def _row_flops(method: str, capture: Path, teacher: Path, start: Path) -> float:
    """Return what a captured row took: its writer reads each token once, and a teacher that scores it once more."""
    units = read_manifest(capture).units
    tokens = sum(unit.input_tokens for unit in units) / sum(unit.rows for unit in units)
    scoring = _forward(teacher)
    writing = _forward(start) if METHODS[method].cache == "own" else scoring
    return tokens * (writing + (scoring if METHODS[method].kd else 0.0))


def _forward(directory: Path) -> float:
    return operations(AutoModelForCausalLM.from_pretrained(directory))[0]


def at_cost(run: Run, flops: float) -> float | None:
    """Return a run's accuracy on long problems at a cost, on a straight line between evaluations; None out of reach."""
    costs, values = run.curve("flops")
    for i in range(1, len(costs)):
        if costs[i - 1] <= flops <= costs[i]:
            share = (flops - costs[i - 1]) / (costs[i] - costs[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


def write_report(runs: Sequence[Run], rates: Mapping[str, float], start: int, updates: int, directory: Path) -> None:
    """Write ``results.md`` and the plots, of what is there.

    Args:
        runs: the trainings that are compared.
        rates: learning rate by method.
        start: of the main comparison.
        updates: at which methods are compared.
        directory: to write to.
    """
    main = _grouped(one for one in runs if one.start == start)
    parts = [_main_table(main, rates, updates), _differences(main, updates), _map_table(runs, updates)]
    (directory / "results.md").write_text("\n\n".join(parts) + "\n")
    _plot(directory / "curves.png", 2, lambda axes: _curves(axes, main))
    _plot(directory / "lengths.png", 1, lambda axes: _lengths(axes[0], main, updates))
    starts = sorted({one.start for one in runs})
    _plot(directory / "map.png", len(starts), lambda axes: _map(axes, runs, starts))


def _grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for one in runs:
        groups.setdefault(one.method, []).append(one)
    return {name: groups[name] for name in METHODS if name in groups}


def _scores(runs: Sequence[Run], updates: int, task: str) -> list[list[float]]:
    return [one.at(updates)["shares"][task] for one in runs]


def _main_table(groups: Mapping[str, list[Run]], rates: Mapping[str, float], updates: int) -> str:
    costs = [
        fmean(run.points[-1]["flops"] for run in runs) for name, runs in groups.items() if not METHODS[name].reward
    ]
    equal = min(costs, default=0.0)
    lines = [
        f"| method | rate | long, {updates} updates | at T = 0.6 | middle | short | pass@{COMPLETIONS} "
        f"| TFLOPs | long, {equal / 1e12:.2f} TFLOPs | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in groups.items():
        found = {task: accuracy(_scores(runs, updates, task)) for task in TASKS}
        covered = fmean(
            pass_at(COMPLETIONS, round(share * COMPLETIONS), COMPLETIONS)
            for shares in _scores(runs, updates, "long")
            for share in shares
        )
        there = [value for run in runs if (value := at_cost(run, equal)) is not None]
        one = found["long"]
        lines.append(
            f"| {name} | {rates[name]:g} | {one.value:.3f} [{one.low:.3f}, {one.high:.3f}] "
            f"| {found['long_cool'].value:.3f} | {found['middle'].value:.3f} | {found['short'].value:.3f} "
            f"| {covered:.3f} | {fmean(run.at(updates)['flops'] for run in runs) / 1e12:.2f} "
            f"| {f'{fmean(there):.3f}' if there else 'none'} | {len(runs)} |"
        )
    return "\n".join(lines)


def _differences(groups: Mapping[str, list[Run]], updates: int) -> str:
    """Every on-policy method against every offline one, on the same questions."""
    lines = []
    for task, words in (("long", "T = 1"), ("long_cool", "T = 0.6")):
        pairs = compare_all({name: _scores(runs, updates, task) for name, runs in groups.items()})
        lines += [
            f"Long problems, {words}, {updates} updates:",
            "",
            "| ahead | behind | difference | real |",
            "|---|---|---:|---|",
        ]
        for pair in sorted(pairs, key=lambda one: -one.gap.value):
            if METHODS[pair.first].offline != METHODS[pair.second].offline:
                lines.append(f"| {pair.first} | {pair.second} | {pair.gap} | {'yes' if pair.real else 'no'} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _map_table(runs: Sequence[Run], updates: int) -> str:
    counts = sorted({point["updates"] for one in runs for point in one.points if point["updates"] <= updates})
    lines = [
        "| start | method | " + " | ".join(f"{count} updates" for count in counts) + " | seeds |",
        "|---:|---|" + "---:|" * (len(counts) + 1),
    ]
    for start in sorted({one.start for one in runs}):
        for name, group in _grouped(one for one in runs if one.start == start).items():
            cells = [f"{accuracy(_scores(group, count, 'long')).value:.3f}" for count in counts]
            lines.append(f"| {start} | {name} | " + " | ".join(cells) + f" | {len(group)} |")
    return "\n".join(lines)


def _plot(path: Path, panels: int, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels + 2.5, 4.5), squeeze=False, sharey=True)
    draw(axes[0])
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][0].set_ylim(0, 1)
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _style(name: str) -> dict[str, Any]:
    place = list(METHODS).index(name)
    line = ":" if METHODS[name].reward else "--" if METHODS[name].offline else "-"
    color = "black" if METHODS[name].reward else f"C{place}"
    return {"color": color, "linestyle": line, "marker": "o", "markersize": 4, "label": name}


def _mean_curve(runs: Sequence[Run], by: str) -> tuple[list[float], list[float]]:
    curves = [one.curve(by) for one in runs]
    return [fmean(xs) for xs in zip(*(x for x, _ in curves), strict=True)], [
        fmean(ys) for ys in zip(*(y for _, y in curves), strict=True)
    ]


def _curves(axes: Any, groups: Mapping[str, list[Run]]) -> None:
    for axis, by, words in (
        (axes[0], "updates", "updates"),
        (axes[1], "flops", "FLOPs of student, teacher and captures"),
    ):
        for name, runs in groups.items():
            axis.plot(*_mean_curve(runs, by), **_style(name))
        axis.set_xlabel(words)
        axis.grid(alpha=0.3)


def _lengths(axis: Any, groups: Mapping[str, list[Run]], updates: int) -> None:
    for name, runs in groups.items():
        values = [fmean(map(fmean, _scores(runs, updates, task))) for task in ("short", "middle", "long")]
        axis.plot(["10 steps", "20 steps", "40 steps"], values, **_style(name))
    axis.grid(alpha=0.3)


def _map(axes: Any, runs: Sequence[Run], starts: Sequence[int]) -> None:
    everywhere = set.intersection(*({one.method for one in runs if one.start == start} for start in starts))
    for axis, start in zip(axes, starts, strict=True):
        for name, group in _grouped(one for one in runs if one.start == start and one.method in everywhere).items():
            axis.plot(*_mean_curve(group, "updates"), **_style(name))
        axis.set_xlabel(f"updates from the start of {start}")
        axis.grid(alpha=0.3)
