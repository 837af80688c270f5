"""The smallest student that is good enough: rungs, plans and terms first, then the climb, and the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, KDError, require_known_keys
from kd_plugin.evaluation.evaluate import evaluate
from kd_plugin.evaluation.recipes import Recipes, shape_of, student_path
from kd_plugin.evaluation.results import Evaluation
from kd_plugin.evaluation.tasks import load_tasks
from kd_plugin.inputs import read_yaml
from kd_plugin.monitor.report import page, section, table_section
from kd_plugin.planner.cost import bills, options, recommended
from kd_plugin.planner.settings import PlanSettings, planned
from kd_plugin.settings import option, settings
from kd_plugin.text import LocalWriter

_OWN = ("student", "name", "offline", "panel", "lineage")


@settings
class LadderConfig:
    """Settings of a ladder.

    Raises:
        ConfigError: a bar that is no accuracy.
    """

    output_dir: str = option(default="", help="Directory of all rungs and of the report.")
    rungs: list[Any] | None = option(
        default=None,
        help="Students from small to large: a path or hub id; or a mapping with student, and name, offline, panel or "
        "lineage in the place of the recipe's.",
    )
    recipe: dict[str, Any] | str = option(
        default="", help="How each rung is trained: a recipe of `kd-plugin run`, such as a pilot's winner.yaml."
    )
    tasks: dict[str, Any] | str = option(
        default="", help="Your own questions: a file of tasks as `kd-plugin evaluate` takes it, or its mapping."
    )
    bar: dict[str, float] | float | None = option(
        default=None, help="Accuracy that is asked for: one number for every task, or a mapping from tasks to numbers."
    )
    plan: dict[str, Any] | None = option(
        default=None, help="Machines and rows of the plan that is shown for each rung: settings of `kd-plugin plan`."
    )
    price_per_hour: float = option(default=0.0, help="Of this machine, by which the report counts what was spent.")
    skip_blocked: bool = option(
        default=False, help="Climb past rungs that the terms forbid, in the place of stopping before the first."
    )

    def __post_init__(self) -> None:
        bars = self.bar.values() if isinstance(self.bar, Mapping) else [self.bar]
        for one in bars:
            if one is not None and not 0 < one <= 1:
                raise ConfigError(f"bar is {one}; expected an accuracy above 0 and at most 1.")


@dataclass(frozen=True)
class Rung:
    """A student on the ladder.

    Attributes:
        name: of its directory.
        student: as a recipe has it.
        size: its parameters; None where its configuration cannot be read.
        recipe: all of its training, as ``kd-plugin run`` takes it.
    """

    name: str
    student: Any
    size: int | None
    recipe: Mapping[str, Any]

    @property
    def place(self) -> Path:
        """Its directory."""
        return Path(self.recipe["output_dir"])


@dataclass(frozen=True)
class Climbed:
    """A rung that was trained.

    Attributes:
        rung: which.
        evaluation: what its student reached.
        seconds: that its training took, captures that it had to make included.
        holds: whether every task's lower bound meets its bar.
    """

    rung: Rung
    evaluation: Evaluation
    seconds: float
    holds: bool


class Ladder:
    """A ladder.

    Args:
        config: its settings.
        recipes: runs the recipes of its rungs.

    Raises:
        ConfigError: a setting is wrong, or a question.
    """

    def __init__(self, config: LadderConfig, recipes: Recipes) -> None:
        self.config, self._recipes = config, recipes
        recipe = config.recipe if isinstance(config.recipe, Mapping) else read_yaml(config.recipe)
        tasks = load_tasks(config.tasks)
        self.bars = _bars(config.bar, [task.name for task in tasks])
        for task in tasks:
            _ = task.plan  # what is wrong with the questions shows before anything is trained
        self.rungs = rungs_of(config.rungs or [], recipe, Path(config.output_dir))

    def forbidden(self) -> list[str]:
        """Print the plan of each rung and the verdict on its terms; return the rungs that these forbid."""
        found = []
        for rung in self.rungs:
            self._recipes.check(rung.recipe)
            print(plan_line(rung, self.config.plan or {}))
            if self._recipes.refused(rung.recipe):
                found.append(rung.name)
        return found

    def run(self, without: Sequence[str], say: Callable[[str], None]) -> tuple[bool, str]:
        """Climb, and write the report; return whether a rung meets the bar, and what people are told.

        Args:
            without: rungs that are left out.
            say: is told what was found at each rung.

        Raises:
            KDError: a stage failed, or no rung is left.
        """
        able = [rung for rung in self.rungs if rung.name not in without]
        if not able:
            raise KDError("The terms forbid every rung.")

        def attempt(rung: Rung) -> tuple[float, Evaluation]:
            shared = rung is not able[0] and "cache_dir" in rung.recipe  # the first rung has paid for captures
            stages = self._recipes.run(rung.recipe)
            seconds = sum(one.seconds for one in stages if one.command != "capture" or not shared)
            student = next(one.result for one in reversed(stages) if one.trains)
            writer = LocalWriter(str(student), name=rung.name)
            return seconds, evaluate(writer, self.config.tasks, rung.place / "evaluation")

        climbed = climb(able, self.bars, attempt, say)
        place = Path(self.config.output_dir)
        return climbed[-1].holds, write_report(climbed, able, self.bars, self.config.price_per_hour, place)


def rungs_of(given: Sequence[Any], recipe: Mapping[str, Any], output_dir: Path) -> list[Rung]:
    """Return the rungs, each with the recipe in which its student stands.

    Captures of what teachers wrote are shared; those of what a student generated are its own.

    Raises:
        ConfigError: an unknown key, no student, or two of one name.
    """
    found: list[Rung] = []
    for number, one in enumerate(given, 1):
        spec: Any = {"student": one} if isinstance(one, str) else one
        where = f"rungs[{number - 1}]"
        if not isinstance(spec, Mapping) or not spec.get("student"):
            raise ConfigError(f"{where}: expected a student, its path or hub id, or a mapping with `student`.")
        require_known_keys(spec, _OWN, where)
        student = spec["student"]
        path = student_path(student)
        name = str(spec.get("name") or f"{number}-{Path(path).name}")
        content = copy.deepcopy(dict(recipe))
        content |= {"student": student, "output_dir": str(output_dir / name)}
        for key in ("offline", "panel"):
            if spec.get(key):
                content[key] = {**(content.get(key) or {}), **spec[key]}
        if spec.get("lineage") is not None:
            content["lineage"] = spec["lineage"]
        capture = content.get("capture") or {}
        if isinstance(capture.get("generate"), Mapping):
            capture["generate"] = {"by": path}
            content.pop("cache_dir", None)
        else:
            content["cache_dir"] = content.get("cache_dir") or str(output_dir / "captures")
        found.append(Rung(name, student, _size(path), content))
    names = [rung.name for rung in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two rungs have the same name: {', '.join(names)}. Give one a `name` of its own.")
    return found


def plan_line(rung: Rung, plan: Mapping[str, Any]) -> str:
    """Say how large a rung is, whether it fits, and what it takes, by the machines and rows that ``plan`` names."""
    if rung.size is None:
        return f"{rung.name}: its configuration cannot be read, so its size and its cost are not known."
    known = [field.name for field in fields(PlanSettings)]
    require_known_keys(plan, known, "plan")
    method = "panel" if rung.recipe.get("panel") is not None else "offline"
    path = student_path(rung.student)
    teachers = [one.get("model") if isinstance(one, Mapping) else one for one in rung.recipe["teachers"].values()]
    here = [f"{one}:sharded" for one in teachers if one and _size(one) is not None]
    if method == "panel" and not here:
        here = [f"{path}:server"]  # some server, which takes no GPU of these
    settings = PlanSettings(**{"student": path, "method": method, "teachers": here, **plan})
    run, cluster = planned(settings)
    best = recommended(options(run, cluster))
    size = (
        f"{rung.name}: {rung.size / 1e9:.3g}B parameters"
        if rung.size >= 1e8
        else f"{rung.name}: {rung.size} parameters"
    )
    if best is None:
        return f"{size}; no layout fits {cluster.ranks} GPUs of {cluster.memory_gib:g} GiB"
    bill = next((b for b in bills(run, cluster, settings.rows, settings.epochs) if b.method == method), None)
    cost = "" if bill is None else f", {bill.hours:.3g} GPU hours, {bill.price:.4g} for {settings.rows} rows"
    return f"{size}; {best.layout.name} on {cluster.ranks} GPUs{cost}"


def climb(
    rungs: Sequence[Rung],
    bars: Mapping[str, float],
    attempt: Callable[[Rung], tuple[float, Evaluation]],
    say: Callable[[str], None],
) -> list[Climbed]:
    """Train and evaluate rung after rung, and stop at the first whose lower bounds meet the bars.

    Args:
        rungs: from small to large.
        bars: by task the accuracy that is asked for.
        attempt: trains a rung and evaluates it; returns the seconds that training took, and the evaluation.
        say: is told what was found.
    """
    found: list[Climbed] = []
    for rung in rungs:
        seconds, evaluation = attempt(rung)
        reached = {name: evaluation.results[name].accuracy for name in bars}
        holds = all(reached[name].low >= bar for name, bar in bars.items())
        found.append(Climbed(rung, evaluation, seconds, holds))
        words = ", ".join(f"{name} {one} (bar {bars[name]:g})" for name, one in reached.items())
        say(f"{rung.name}: {words}: {'it holds' if holds else 'it does not hold for sure'}")
        if holds:
            break
    return found


def write_report(
    climbed: Sequence[Climbed], rungs: Sequence[Rung], bars: Mapping[str, float], price_per_hour: float, place: Path
) -> str:
    """Write ``report.html`` and ``outcome.json``; return what people are told."""
    last = climbed[-1]
    verdict = (
        f"Take {last.rung.name}: its lower bound meets the bar."
        if last.holds
        else f"No rung meets the bar for sure; the last that was tried is {last.rung.name}."
    )
    rows = [("rung", "parameters", *[f"{name}, 95%" for name in bars], "hours", "price", "bar")]
    for one in climbed:
        accuracies = [str(one.evaluation.results[name].accuracy) for name in bars]
        hours = one.seconds / 3600
        row = (one.rung.name, _shown(one.rung.size), *accuracies, f"{hours:.3g}", f"{hours * price_per_hour:.3g}")
        rows.append((*row, "met" if one.holds else "not for sure"))
    for rung in rungs[len(climbed) :]:
        rows.append((rung.name, _shown(rung.size), *["not trained"] * len(bars), "", "", ""))
    outcome = {
        "verdict": verdict,
        "rung": last.rung.name if last.holds else None,
        "bars": dict(bars),
        "rungs": [
            {
                "name": one.rung.name,
                "parameters": one.rung.size,
                "seconds": one.seconds,
                "holds": one.holds,
                "accuracy": {name: asdict(one.evaluation.results[name].accuracy) for name in bars},
            }
            for one in climbed
        ],
    }
    (place / "outcome.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    (place / "report.html").write_text(_page(climbed, bars, price_per_hour, rows, verdict), encoding="utf-8")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, "", verdict, f"The plots: {place / 'report.html'}"])


def _page(
    climbed: Sequence[Climbed],
    bars: Mapping[str, float],
    price_per_hour: float,
    rows: Sequence[Sequence[str]],
    verdict: str,
) -> str:
    parts = []
    sizes = [float(one.rung.size or 0) for one in climbed]
    total, prices = 0.0, []
    for one in climbed:
        total += one.seconds / 3600 * (price_per_hour or 1.0)
        prices.append(total)
    for over, xs in (("size", sizes), ("price so far" if price_per_hour else "hours so far", prices)):
        found = {name: [one.evaluation.results[name].accuracy for one in climbed] for name in bars}
        series = {name: [(x, one.value) for x, one in zip(xs, those, strict=True)] for name, those in found.items()}
        ends = {name: [(one.low, one.high) for one in those] for name, those in found.items()}
        unit = "parameters; broken line: the bar" if over == "size" else "broken line: the bar"
        parts.append(section(f"Accuracy against {over}", unit, series, over=over, bars=ends, levels=bars))
    return page("Ladder", verdict, [*parts, table_section("Rungs", rows)])


def _bars(given: Any, names: Sequence[str]) -> dict[str, float]:
    """Return by task the accuracy that is asked for.

    Raises:
        ConfigError: a bar of a task that is not there.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, float(given))
    for name in given:
        if name not in names:
            raise ConfigError(f"bar: there is no task {name!r}; expected one of {', '.join(names)}.")
    return {str(name): float(value) for name, value in given.items()}


def _shown(size: int | None) -> str:
    return "?" if size is None else f"{size:,}"


def _size(model: Any) -> int | None:
    shape = shape_of(model)
    return None if shape is None else shape.total
