"""What a pilot found: a table for the terminal, ``report.html`` with the plot, and the winner's recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.evaluation.decisions import Comparison
from kd_plugin.evaluation.pilot.trials import Method, Steps
from kd_plugin.evaluation.statistics import Estimate
from kd_plugin.monitor.report import page, section, table_section

WINNER, REPORT, OUTCOME = "winner.yaml", "report.html", "outcome.json"


@dataclass(frozen=True)
class Result:
    """What a method reached.

    Attributes:
        method: which.
        learning_rate: chosen for it by the scan.
        steps: how long it trained.
        curve: (cost, accuracy) at each evaluation, means over the seeds.
        cost: of a run, mean over the seeds, in the unit.
        accuracy: at the end, over questions and seeds.
        seeds: how many.
    """

    method: Method
    learning_rate: float
    steps: Steps
    curve: tuple[tuple[float, Estimate], ...]
    cost: float
    accuracy: Estimate
    seeds: int


@dataclass(frozen=True)
class PilotOutcome:
    """What a pilot found.

    Attributes:
        results: of each method, the simplest first.
        pairs: every two of them compared.
        winner: the method to take.
        why: why it, in a sentence.
        recipe: the winner's, for ``kd-plugin run``.
        unit: of costs.
        budget: of a run.
    """

    results: tuple[Result, ...]
    pairs: tuple[Comparison, ...]
    winner: Method
    why: str
    recipe: Mapping[str, Any]
    unit: str
    budget: float


def write_report(outcome: PilotOutcome, directory: Path) -> str:
    """Write ``report.html``, ``outcome.json`` and ``winner.yaml`` into a directory; return what people are told."""
    (directory / OUTCOME).write_text(json.dumps(as_plain(outcome), indent=1) + "\n", encoding="utf-8")
    said = f"# {outcome.winner.name}: {outcome.why}. kd-plugin run {directory / WINNER}\n"
    recipe = yaml.safe_dump(dict(outcome.recipe), sort_keys=False, allow_unicode=True)
    (directory / WINNER).write_text(said + recipe, encoding="utf-8")
    (directory / REPORT).write_text(_page(outcome), encoding="utf-8")
    return "\n".join(
        [
            *_table(outcome),
            "",
            *map(sentence, outcome.pairs),
            "",
            f"Take {outcome.winner.name}: {outcome.why}.",
            f"Its recipe: {directory / WINNER}. The plot: {directory / REPORT}",
        ]
    )


def sentence(pair: Comparison) -> str:
    """Say whether a difference is real."""
    gap = f"{pair.gap.value:+.3f} [{pair.gap.low:+.3f}, {pair.gap.high:+.3f}]"
    said = "a real difference" if pair.real else "no difference that is sure"
    return f"{pair.first} less {pair.second}: {gap}, {said} (p = {pair.chance:.3f} among all pairs)"


def _cells(outcome: PilotOutcome) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("method", "accuracy, 95%", f"{outcome.unit} a run", "steps", "rows captured", "learning rate", "seeds")
    ]
    for one in outcome.results:
        steps = " + ".join(str(count) for count in (one.steps.offline, one.steps.panel) if count)
        row = (one.method.name, str(one.accuracy), f"{one.cost:.3g}", steps, str(one.steps.rows or ""))
        rows.append((*row, f"{one.learning_rate:g}", str(one.seeds)))
    return rows


def _table(outcome: PilotOutcome) -> list[str]:
    rows = _cells(outcome)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _page(outcome: PilotOutcome) -> str:
    series = {one.method.name: [(cost, found.value) for cost, found in one.curve] for one in outcome.results}
    bars = {one.method.name: [(found.low, found.high) for _, found in one.curve] for one in outcome.results}
    differences = "".join(f"<p>{escape(sentence(pair))}</p>" for pair in outcome.pairs)
    parts = [
        section("Accuracy against cost", outcome.unit, series, over=outcome.unit, bars=bars),
        f"<section><h2>Which differences are real</h2>{differences}</section>",
        table_section(f"At the end, at a budget of {outcome.budget:g}", _cells(outcome)),
    ]
    return page("Pilot", f"Take {outcome.winner.name}: {outcome.why}.", parts)


def as_plain(outcome: PilotOutcome) -> dict[str, Any]:
    """Return an outcome as plain values, for ``outcome.json``."""
    return {
        "unit": outcome.unit,
        "budget": outcome.budget,
        "winner": outcome.winner.name,
        "why": outcome.why,
        "methods": {
            one.method.name: {
                "accuracy": asdict(one.accuracy),
                "cost": one.cost,
                "learning_rate": one.learning_rate,
                "steps": asdict(one.steps),
                "seeds": one.seeds,
                "curve": [[cost, asdict(found)] for cost, found in one.curve],
            }
            for one in outcome.results
        },
        "differences": [{**asdict(pair), "real": pair.real} for pair in outcome.pairs],
    }
