"""What a pilot found: a table for the terminal, ``report.html`` with the plot, and the winner's recipe."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import yaml

from kd_plugin.cli.pilot_plan import Outcome, as_plain
from kd_plugin.evaluation.decisions import Comparison
from kd_plugin.monitor.report import page, section

WINNER, REPORT, OUTCOME = "winner.yaml", "report.html", "outcome.json"


def write_report(outcome: Outcome, directory: Path) -> str:
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


def _cells(outcome: Outcome) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("method", "accuracy, 95%", f"{outcome.unit} a run", "steps", "rows captured", "learning rate", "seeds")
    ]
    for one in outcome.results:
        steps = " + ".join(str(count) for count in (one.steps.offline, one.steps.panel) if count)
        row = (one.method.name, str(one.accuracy), f"{one.cost:.3g}", steps, str(one.steps.rows or ""))
        rows.append((*row, f"{one.learning_rate:g}", str(one.seeds)))
    return rows


def _table(outcome: Outcome) -> list[str]:
    rows = _cells(outcome)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _page(outcome: Outcome) -> str:
    series = {one.method.name: [(cost, found.value) for cost, found in one.curve] for one in outcome.results}
    bars = {one.method.name: [(found.low, found.high) for _, found in one.curve] for one in outcome.results}
    head, *rows = _cells(outcome)
    table = f"<tr>{''.join(f'<th>{escape(cell)}' for cell in head)}</tr>" + "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}</tr>" for row in rows
    )
    differences = "".join(f"<p>{escape(sentence(pair))}</p>" for pair in outcome.pairs)
    parts = [
        section("Accuracy against cost", outcome.unit, series, over=outcome.unit, bars=bars),
        f"<section><h2>At the end, at a budget of {outcome.budget:g}</h2><table>{table}</table></section>",
        f"<section><h2>Which differences are real</h2>{differences}</section>",
    ]
    return page("Pilot", f"Take {outcome.winner.name}: {outcome.why}.", parts)
