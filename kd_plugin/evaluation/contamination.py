"""Whether the questions of a task were in the training data, wholly or nearly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_plugin.evaluation.results import RESPONSES, Evaluation, TaskResult, result_of
from kd_plugin.evaluation.tasks import Task
from kd_plugin.text.contamination import Contamination, EvaluationItems

FILE = "contaminated.jsonl"
_NGRAM, _OVERLAP = 5, 0.5  # as a capture of text has them


def find_contaminated(
    tasks: Sequence[Task], training: Iterable[Mapping[str, Any]], *, ngram: int = _NGRAM, overlap: float = _OVERLAP
) -> dict[str, list[Contamination]]:
    """Return by task the questions that some training row holds, each once; see :mod:`kd_plugin.text.contamination`.

    Args:
        tasks: whose questions are looked for.
        training: rows of any form: all their text is read.
        ngram: words of an n-gram.
        overlap: part of a question's n-grams from which it counts as found.
    """
    items = {task.name: EvaluationItems(ngram, overlap) for task in tasks}
    for task in tasks:
        for number, row in enumerate(task.questions.slice(0, len(task.questions))):
            prompt = task.plan.prompt(row, f"Task {task.name!r}, row {number},")
            asked = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt if m["role"] == "user")
            items[task.name].add(task.name, number, asked)
    found: dict[str, dict[int, Contamination]] = {task.name: {} for task in tasks}
    for row in training:
        text = " ".join(_texts(row))
        for name, index in items.items():
            one = index.find(text)
            if one is not None and one.overlap > getattr(found[name].get(one.item), "overlap", 0.0):
                found[name][one.item] = one
    return {name: [those[item] for item in sorted(those)] for name, those in found.items()}


def without(evaluation: Evaluation, found: Mapping[str, Sequence[Contamination]]) -> dict[str, TaskResult]:
    """Return what was reached on the questions that are not among ``found``; tasks of which none is left have none."""
    clean = {}
    for name, result in evaluation.results.items():
        rows = [one.item for one in found.get(name, ())]
        table = pq.read_table(evaluation.path / name / RESPONSES)
        left = table.filter(pc.invert(pc.is_in(table["row"], value_set=_integers(rows))))
        if rows and len(left):
            clean[name] = result_of(name, left, result.asked)
    return clean


def write_contaminated(directory: Path, found: Mapping[str, Sequence[Contamination]]) -> Path:
    """Write what was found, a line each, and return the file."""
    path = directory / FILE
    lines = [json.dumps(asdict(one), ensure_ascii=False) for those in found.values() for one in those]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _texts(value: Any) -> Iterable[str]:
    """Yield every text in a row, however deep: a prompt, messages, a completion."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple) and not (value and isinstance(value[0], int | float)):
        for one in value:
            yield from _texts(one)


def _integers(rows: Sequence[int]) -> Any:
    import pyarrow as pa

    return pa.array(rows, pa.int64())
