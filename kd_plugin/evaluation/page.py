"""The answers of an evaluation as one page: what was asked, and what was wrong. It needs no network and no script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kd_plugin.cache.files import publish, temporary_name
from kd_plugin.evaluation.results import RESPONSES, Evaluation, TaskResult
from kd_plugin.evaluation.statistics import Estimate

PAGE = "page.html"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8885; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; font: 14px/1.5 ui-monospace, monospace; }
summary { cursor: pointer; overflow-wrap: anywhere; padding: .25rem 0; }
.answer { border-left: 4px solid #c33; padding-left: .75rem; margin: .75rem 0; }
.right { border-color: #283; }
.why { opacity: .75; }
"""


def write_page(
    evaluation: Evaluation, differences: Mapping[str, Estimate] | None = None, *, questions: int = 200
) -> Path:
    """Write ``page.html`` into the directory of an evaluation, and return its path.

    Args:
        evaluation: as it is stored.
        differences: from another model, by task.
        questions: how many a task are shown; those with the most wrong answers come first.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(evaluation.model)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(evaluation.model)}</h1>",
        *_summary(evaluation, differences or {}),
    ]
    for name, result in evaluation.results.items():
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.extend(_questions(evaluation.path / name / RESPONSES, questions, result))
    made = temporary_name(evaluation.path, PAGE)
    made.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")
    publish(made, evaluation.path / PAGE)
    return evaluation.path / PAGE


def _summary(evaluation: Evaluation, differences: Mapping[str, Estimate]) -> Iterator[str]:
    yield "<table><tr><th>task<th>pass@1<th>pass@k<th>questions x answers<th>unfinished"
    yield "<th>difference</tr>" if differences else "</tr>"
    for name, result in evaluation.results.items():
        most = max(result.pass_at)
        cells = [
            name,
            str(result.accuracy),
            f"pass@{most} {result.pass_at[most]}" if most > 1 else "",
            f"{result.questions} x {result.answers}",
            f"{result.unfinished:.0%}",
        ]
        if differences:
            cells.append(_signed(differences[name]) if name in differences else "")
        yield "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells) + "</tr>"
    yield "</table>"


def _signed(found: Estimate) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _questions(path: Path, most: int, result: TaskResult) -> Iterator[str]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for answer in pq.read_table(path).to_pylist():
        rows.setdefault(answer["row"], []).append(answer)
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.reasons.items())
    yield f"<p class=why>{escape(reasons or 'All answers are right.')}</p>"
    if len(rows) > most:
        yield f"<p class=why>The {most} questions with the most wrong answers, of {len(rows)}.</p>"
    order = sorted(rows, key=lambda row: (sum(answer["passed"] for answer in rows[row]) / len(rows[row]), row))
    for row in order[:most]:
        answers = rows[row]
        asked = _asked(answers[0]["prompt"])
        right = sum(answer["passed"] for answer in answers)
        yield f"<details><summary>{right} of {len(answers)} right · row {row} · {escape(asked[:160])}"
        yield f"</summary><pre>{escape(asked)}</pre>"
        for answer in answers:
            why = answer["why_not"] or ("" if answer["passed"] else "no text")
            yield f"<div class='answer{' right' if answer['passed'] else ''}'>"
            if answer["reasoning"]:
                yield "<details><summary class=why>reasoning</summary>"
                yield f"<pre>{escape(answer['reasoning'])}</pre></details>"
            yield f"<pre>{escape(answer['response'])}</pre><span class=why>{escape(why)}</span></div>"
        yield "</details>"


def _asked(prompt: str) -> str:
    """Return a prompt, JSON of a text or of messages, as text."""
    found = json.loads(prompt)
    if isinstance(found, str):
        return found
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in found)
