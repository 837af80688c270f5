"""Evaluate a model: ask it every question of every task, verify its answers, and say how sure the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kd_plugin.capturing.work import Progress
from kd_plugin.evaluation.results import RESPONSES, Evaluation, TaskResult, result_of, store_responses, store_results
from kd_plugin.evaluation.tasks import Task, load_tasks
from kd_plugin.text.collecting import Collection
from kd_plugin.text.spending import Budget
from kd_plugin.text.store import AnswerStore
from kd_plugin.text.writers import Writer


def evaluate(
    model: Writer, tasks: Mapping[str, Any] | str | Path, output_dir: str | Path, *, progress: bool = True
) -> Evaluation:
    """Ask ``model`` every question of ``tasks``, verify its answers, and store all of it.

    Run the same call again to go on after an interruption: no answer that came is lost.

    Args:
        model: :class:`~kd_plugin.text.LocalWriter` of a model here, or :class:`~kd_plugin.text.ServerWriter`.
        tasks: see :func:`~kd_plugin.evaluation.tasks.load_tasks`.
        output_dir: a directory; each task has one of its own in it, with ``responses.parquet``.
        progress: show how far it is, on standard error.

    Raises:
        ConfigError: a task is wrong, or the directory holds another evaluation.
        DataError: questions cannot be read, or a verifier failed.
        ServerError: a server is away for good; what was answered is kept.
    """
    found = load_tasks(tasks)
    for task in found:  # what is wrong with the last one shows before the first is asked
        task.plan.prompt(task.questions.slice(0, 1)[0], f"Task {task.name!r}, row 0,")
    directory = Path(output_dir)
    results = {task.name: _evaluated(task, model, directory / task.name, progress) for task in found}
    evaluation = Evaluation(directory, model.name, results)
    store_results(evaluation, model.identity)
    return evaluation


def _evaluated(task: Task, model: Writer, directory: Path, progress: bool) -> TaskResult:
    """Ask what is missing of a task, and store its responses."""
    plan = task.plan
    # Through JSON, as it is read again
    identity = json.loads(json.dumps({"model": dict(model.identity), **task.identity}))
    store = AnswerStore(directory, {"format": 1, **identity})
    with store.alone():
        done = min(sum(map(store.finished, range(plan.units))) * plan.unit_rows, len(plan.rows))
        with Progress(len(plan.rows), done, progress, task.name) as bar:
            Collection(plan, store, [model], Budget()).run(bar)
        store_responses(directory, (store.table(unit) for unit in range(plan.units)))
    columns = ["row", "passed", "ended", "tokens_written", "why_not"]
    return result_of(task.name, pq.read_table(directory / RESPONSES, columns=columns), task.identity)
