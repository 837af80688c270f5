"""What a model reached: counted from its answers, kept in a directory, read again, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_plugin.cache.files import explained, fitting, publish, temporary_name
from kd_plugin.errors import CacheError, ConfigError, DataError
from kd_plugin.evaluation.cost import Cost
from kd_plugin.evaluation.statistics import Estimate, difference, pass_at, rate
from kd_plugin.evaluation.tasks import require_task_name
from kd_plugin.text.writers import TOO_LONG

RESULTS, RESPONSES = "results.json", "responses.parquet"
_WAY_OUT = "Answers that are there are kept: make room, and run the same command again."
_KEPT = ("row", "sample", "prompt", "response", "reasoning", "ended", "tokens_written", "passed", "score", "why_not")


@dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task.

    Attributes:
        name: of the task.
        pass_at: k to pass@k; pass@1 is the mean over all answers.
        questions: how many were asked.
        answers: to each of them.
        unfinished: share of the answers that reached ``max_new_tokens``.
        tokens: mean tokens of an answer, where the model counts them.
        reasons: why answers are not right, with their numbers.
        asked: what decides the answers; equal for two models that can be compared.
    """

    name: str
    pass_at: Mapping[int, Estimate]
    questions: int
    answers: int
    unfinished: float
    tokens: float | None
    reasons: Mapping[str, int]
    asked: Mapping[str, Any]

    @property
    def accuracy(self) -> Estimate:
        """pass@1."""
        return self.pass_at[1]


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on its tasks, as a directory holds it.

    Attributes:
        path: the directory.
        model: its name.
        results: task's name to its result.
        cost: of the training until then, where it was evaluated while it trained.
    """

    path: Path
    model: str
    results: Mapping[str, TaskResult]
    cost: Cost | None = None


def store_responses(directory: Path, tables: Iterable[pa.Table]) -> None:
    """Write the answers to a task into its directory, as ``responses.parquet``."""
    made = temporary_name(directory, RESPONSES)
    with explained(f"Writing {directory / RESPONSES}", _WAY_OUT):
        _write(made, tables)
        publish(made, directory / RESPONSES)


def store_results(evaluation: Evaluation, described: Mapping[str, Any]) -> None:
    """Write ``results.json``.

    Args:
        evaluation: what was reached.
        described: what the model is, where JSON can hold it.
    """
    directory = evaluation.path
    with explained(f"Writing {directory / RESULTS}", _WAY_OUT):
        made = temporary_name(directory, RESULTS)
        made.write_text(json.dumps(_plain(evaluation, described), indent=1, ensure_ascii=False), encoding="utf-8")
        publish(made, directory / RESULTS)


def load_evaluation(directory: str | Path) -> Evaluation:
    """Read what :func:`evaluate` stored.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(directory) / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = {}
        for name, one in content["tasks"].items():
            require_task_name(name)
            estimates = {int(k): Estimate(**fitting(Estimate, v, f"pass@{k}")) for k, v in one.pop("pass_at").items()}
            given = {"name": name, **one, "pass_at": estimates}
            results[name] = TaskResult(**fitting(TaskResult, given, f"task {name!r}", ignored=("pass_at",)))
        cost = content.get("cost")
        taken = None if cost is None else Cost(**fitting(Cost, cost, "cost"))
        return Evaluation(Path(directory), content["model"], results, taken)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {directory} holds no finished evaluation.") from error
    except (ValueError, KeyError, TypeError, AttributeError, CacheError, ConfigError) as error:
        raise DataError(f"{path} is not as `kd-plugin evaluate` writes it: {error}. Evaluate again.") from error


def compare(ours: Evaluation, theirs: Evaluation) -> dict[str, Estimate]:
    """Return the difference in pass@1, ours less theirs, on each task that both have, question by question.

    Raises:
        ConfigError: a task was asked in two ways, so that a difference would not be the models'.
    """
    found = {}
    for name in ours.results:
        if name not in theirs.results:
            continue
        mine, other = ours.results[name].asked, theirs.results[name].asked
        # The number of answers and the seed change how sure a result is, and not what it is of
        differing = [key for key in mine if mine[key] != other.get(key) and key not in ("completions", "seed")]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"Task {name!r} was asked in two ways: {key} is {mine[key]!r} in {ours.path} and {other.get(key)!r} in "
                f"{theirs.path}. Evaluate one of them again."
            )
        found[name] = difference(shares_of(ours.path / name), shares_of(theirs.path / name))
    return found


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    writer = None
    for table in tables:
        kept = table.select(_KEPT)
        if writer is None:
            writer = pq.ParquetWriter(path, kept.schema, compression="zstd")
        writer.write_table(kept)
    if writer is not None:
        writer.close()


def result_of(name: str, table: pa.Table, asked: Mapping[str, Any]) -> TaskResult:
    """Count a task's answers: a table with ``row``, ``passed``, ``ended``, ``tokens_written`` and ``why_not``."""
    right, count = _counts(table)
    drawn = min(count)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= drawn]
    ended, written = table["ended"].to_pylist(), [t for t in table["tokens_written"].to_pylist() if t is not None]
    reasons: dict[str, int] = {}
    for passed, why in zip(table["passed"].to_pylist(), table["why_not"].to_pylist(), strict=True):
        if not passed:
            reasons[why or "no text"] = reasons.get(why or "no text", 0) + 1
    return TaskResult(
        name,
        {k: rate([pass_at(k, c, n) for c, n in zip(right, count, strict=True)]) for k in ks},
        len(right),
        drawn,
        ended.count(TOO_LONG) / len(ended),
        sum(written) / len(written) if written else None,
        dict(sorted(reasons.items(), key=lambda one: -one[1])),
        dict(asked),
    )


def shares_of(directory: Path) -> Sequence[float]:
    """Return for each question the share of its answers that are right."""
    try:
        table = pq.read_table(directory / RESPONSES, columns=["row", "passed"])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{directory / RESPONSES} cannot be read ({error}). Evaluate again.") from error
    return [right / count for right, count in zip(*_counts(table), strict=True)]


def _counts(table: pa.Table) -> tuple[list[int], list[int]]:
    """Return for each question, in order, how many of its answers are right, and how many there are."""
    found = table.group_by("row").aggregate([("passed", "sum"), ("passed", "count")]).sort_by("row")
    return found["passed_sum"].to_pylist(), found["passed_count"].to_pylist()


def _plain(evaluation: Evaluation, described: Mapping[str, Any]) -> dict[str, Any]:
    tasks = {}
    for name, result in evaluation.results.items():
        values = asdict(result)
        del values["name"]
        tasks[name] = values
    identity: Any = None
    with suppress(TypeError, ValueError):
        identity = json.loads(json.dumps(dict(described)))
    cost = {} if evaluation.cost is None else {"cost": asdict(evaluation.cost)}
    return {"format": 1, "model": evaluation.model, "identity": identity, **cost, "tasks": tasks}
