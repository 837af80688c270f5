"""The rungs of a ladder: their recipes, plans and terms before the first is trained, the climb, and the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.cli.parsing import parse_settings
from kd_plugin.cli.plan import PlanSettings, planned
from kd_plugin.cli.recipe import Recipe, stages_of
from kd_plugin.cli.stages import Stages
from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.evaluation.results import Evaluation
from kd_plugin.monitor.report import page, section
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.cost import bills, options, recommended

_OWN = ("student", "name", "offline", "panel", "lineage")


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

    def stages(self) -> tuple[Recipe, Stages]:
        """Write its recipe, and return it with its stages; nothing is run.

        Raises:
            ConfigError: a setting is wrong.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        path = self.place / "recipe.yaml"
        path.write_text(yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
        parsed = parse_settings(Recipe, ["--config", str(path)], command="run", description="")
        assert parsed.file is not None
        recipe = parsed.settings
        return recipe, Stages(recipe.output_dir, stages_of(recipe, parsed.file), recipe.cache_dir)


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


def rungs_of(given: Sequence[Any], recipe: Mapping[str, Any], output_dir: Path) -> list[Rung]:
    """Return the rungs, each with the recipe in which its student stands.

    Captures of what teachers wrote are shared; those of what a student wrote are its own.

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
        path = student["model_name_or_path"] if isinstance(student, Mapping) else student
        name = str(spec.get("name") or f"{number}-{Path(str(path)).name}")
        content = copy.deepcopy(dict(recipe))
        content |= {"student": student, "output_dir": str(output_dir / name)}
        for key in ("offline", "panel"):
            if spec.get(key):
                content[key] = {**(content.get(key) or {}), **spec[key]}
        if spec.get("lineage") is not None:
            content["lineage"] = spec["lineage"]
        capture = content.get("capture") or {}
        if isinstance(capture.get("generate"), Mapping):
            capture["generate"] = {"by": str(path)}
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
    path = rung.student["model_name_or_path"] if isinstance(rung.student, Mapping) else rung.student
    teachers = [one.get("model") if isinstance(one, Mapping) else one for one in rung.recipe["teachers"].values()]
    here = [f"{one}:sharded" for one in teachers if one and _size(one) is not None]
    if method == "panel" and not here:
        here = [f"{path}:server"]  # some server, which takes no GPU of these
    given = {"student": str(path), "method": method, "teachers": here, **plan}
    run, cluster = planned(PlanSettings(**given))
    best = recommended(options(run, cluster))
    size = (
        f"{rung.name}: {rung.size / 1e9:.3g}B parameters"
        if rung.size >= 1e8
        else f"{rung.name}: {rung.size} parameters"
    )
    if best is None:
        return f"{size}; no layout fits {cluster.ranks} GPUs of {cluster.memory_gib:g} GiB"
    settings = PlanSettings(**given)
    bill = next((b for b in bills(run, cluster, settings.rows, settings.epochs) if b.method == method), None)
    cost = "" if bill is None else f", {bill.hours:.3g} GPU hours, {bill.price:.4g} for {settings.rows} rows"
    return f"{size}; {best.layout.name} on {cluster.ranks} GPUs{cost}"


def climb(
    rungs: Sequence[Rung],
    bars: Mapping[str, float],
    train: Callable[[Rung], float],
    measure: Callable[[Rung], Evaluation],
    say: Callable[[str], None],
) -> list[Climbed]:
    """Train and evaluate rung after rung, and stop at the first whose lower bounds meet the bars.

    Args:
        rungs: from small to large.
        bars: by task the accuracy that is asked for.
        train: trains a rung, and returns the seconds that it took.
        measure: evaluates it.
        say: is told what was found.
    """
    found: list[Climbed] = []
    for rung in rungs:
        seconds = train(rung)
        evaluation = measure(rung)
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
        row = (one.rung.name, str(one.rung.size or "?"), *accuracies, f"{hours:.3g}", f"{hours * price_per_hour:.3g}")
        rows.append((*row, "met" if one.holds else "not for sure"))
    for rung in rungs[len(climbed) :]:
        rows.append((rung.name, str(rung.size or "?"), *["not trained"] * len(bars), "", "", ""))
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
    for over, xs in (("parameters", sizes), ("price so far" if price_per_hour else "hours so far", prices)):
        found = {name: [one.evaluation.results[name].accuracy for one in climbed] for name in bars}
        series = {name: [(x, one.value) for x, one in zip(xs, those, strict=True)] for name, those in found.items()}
        ends = {name: [(one.low, one.high) for one in those] for name, those in found.items()}
        parts.append(section(f"Accuracy against {over}", over, series, over=over, bars=ends))
    head, *body = rows
    table = f"<tr>{''.join(f'<th>{escape(cell)}' for cell in head)}</tr>" + "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}</tr>" for row in body
    )
    return page("Ladder", verdict, [*parts, f"<section><h2>Rungs</h2><table>{table}</table></section>"])


def _size(model: Any) -> int | None:
    try:
        return architecture(str(model)).total
    except (ConfigError, OSError):
        return None
