"""Tasks that a student answers while it trains, with the weights of that moment. Training does not notice.

The answers are those that ``kd-plugin evaluate`` gets of a checkpoint with these weights: each text depends on its
prompt and its own seed alone, by random numbers that are no one else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from kd_plugin.capturing.generating import Generator, generate_with
from kd_plugin.capturing.rows import Row
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.cost import Cost
from kd_plugin.evaluation.results import Evaluation, TaskResult, result_of, store_responses, store_results
from kd_plugin.evaluation.tasks import Task, load_tasks
from kd_plugin.models import output_rows
from kd_plugin.rollouts.in_process import random_states_kept
from kd_plugin.settings import option, settings
from kd_plugin.sharding import called
from kd_plugin.text.collecting import answer_line, verdicts_of
from kd_plugin.text.local import answer_of, request_of
from kd_plugin.text.store import SCHEMA, Slot
from kd_plugin.text.writers import Ask, Prompt
from kd_plugin.vocab import Vocabulary

EVALUATIONS = "evaluations"


@settings
class EvaluationSettings:
    """The user's own set, asked at every evaluation of the training.

    Raises:
        ConfigError: ``eval_tasks_batch_size`` is below 1.
    """

    eval_tasks: dict[str, Any] | str | None = option(
        default=None,
        help="Your own questions, answered at every evaluation: a file of tasks as `kd-plugin evaluate` takes it, or "
        "its mapping. Logs each task's accuracy with its standard error; the best checkpoint may be chosen by it. No "
        "other rows are needed; commands take some where dataset_test_split names them.",
    )
    eval_tasks_batch_size: int = option(default=16, help="Answers to eval_tasks that are generated at once.")

    def __post_init__(self) -> None:
        if self.eval_tasks_batch_size < 1:
            raise ConfigError(f"eval_tasks_batch_size is {self.eval_tasks_batch_size}; expected at least 1.")


@dataclass(frozen=True)
class Ranks:
    """The processes that evaluate together.

    Attributes:
        rank: number of this one.
        world: how many there are.
        gather: joins the lists of all of them, on each of them; a collective call.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = list


@dataclass(frozen=True)
class Learner:
    """The student as it is now.

    Attributes:
        model: unwrapped: a transformers model, PEFT-wrapped or not.
        tokenizer: its tokenizer.
        device: where it computes.
        run: runs a function inside what gathers its weights.
        sharded: whether ranks hold parts of it, so that all of them generate together.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    run: Callable[..., Any] = called
    sharded: bool = False

    def generator(self, together: bool) -> Generator:
        """Return what generates, ending as a checkpoint of it would.

        Raises:
            ConfigError: neither its tokenizer nor its generation configuration names an end token.
        """
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = {own} if isinstance(own, int) else set(own or ())
        ends |= {self.tokenizer.eos_token_id} - {None}
        if not ends:
            raise ConfigError("eval_tasks: the student has no end token, so its answers never end. Set eos_token.")
        size = Vocabulary.from_tokenizer(self.tokenizer).within(output_rows(self.model)).size
        return Generator(self.model, tuple(sorted(ends)), size, self.device, self.run, together)


@dataclass(frozen=True)
class _Question:
    """One text that is asked for."""

    slot: Slot
    prompt: Prompt
    ask: Ask
    row: Row


class TasksInLoop:
    """The tasks of a training run, read and checked when it is set up.

    Args:
        given: what the user set.

    Raises:
        ConfigError: a task is wrong.
        DataError: its questions cannot be read.
    """

    def __init__(self, given: EvaluationSettings) -> None:
        assert given.eval_tasks is not None
        self.batch_size = given.eval_tasks_batch_size
        self.tasks = load_tasks(given.eval_tasks)
        self._asked = {task.name: list(_asks(task)) for task in self.tasks}

    @classmethod
    def of(cls, given: EvaluationSettings) -> TasksInLoop | None:
        """Return the tasks, or None where there are none; raises as the constructor."""
        return None if given.eval_tasks is None else cls(given)

    def measure(
        self, learner: Learner, ranks: Ranks, *, output_dir: str | Path, step: int, cost: Cost | None = None
    ) -> Evaluation:
        """Ask every question, verify the answers, and store them; a collective call, with the same result on each rank.

        Questions are spread over the ranks. Random states, the model's modes and its gradients stay as they are.

        Args:
            learner: the student.
            ranks: who takes part.
            output_dir: of the run; the first rank writes ``evaluations/step-N`` in it, as ``kd-plugin evaluate`` would.
            step: optimizer steps done.
            cost: of the training so far, in this process; None where nobody counts.
        """
        place = Path(output_dir) / EVALUATIONS / f"step-{step}"
        with unnoticed(learner.model):
            results = {task.name: self._measured(task, learner, ranks, place / task.name) for task in self.tasks}
        taken = None if cost is None else _of_all(ranks.gather([cost]))
        evaluation = Evaluation(place, f"step {step}", results, taken)
        if ranks.rank == 0:
            store_results(evaluation, {"step": step})
        return evaluation

    def _measured(self, task: Task, learner: Learner, ranks: Ranks, place: Path) -> TaskResult:
        mine = self._asked[task.name][ranks.rank :: ranks.world]
        lines = self._lines(task, mine, learner, self._rounds(task, ranks) if learner.sharded else None)
        found = sorted(ranks.gather(lines), key=lambda line: (line["row"], line["sample"]))
        table = pa.Table.from_pylist(found, SCHEMA)
        if ranks.rank == 0:
            place.mkdir(parents=True, exist_ok=True)
            store_responses(place, [table])
        return result_of(task.name, table, task.identity)

    def _rounds(self, task: Task, ranks: Ranks) -> int:
        """Return how many batches the rank with the most questions generates."""
        most = -(-len(self._asked[task.name]) // ranks.world)
        return -(-most // self.batch_size)

    def _lines(
        self, task: Task, asked: Sequence[_Question], learner: Learner, rounds: int | None
    ) -> list[dict[str, Any]]:
        """Answer and verify this rank's questions, in ``rounds`` batches where other ranks wait for each of them."""
        tokenizer, generation = learner.tokenizer, task.settings.generation
        generator = learner.generator(together=rounds is not None)
        requests = [request_of(tokenizer, one.ask, "student") for one in asked]
        batches = [requests[i : i + self.batch_size] for i in range(0, len(requests), self.batch_size)]
        answers = []
        for batch in batches:
            done = generate_with(generator, batch, generation, seed=0)
            answers += [answer_of(tokenizer, *one) for one in zip(batch, done, strict=True)]
        for _ in range(len(batches), rounds or 0):
            first = request_of(tokenizer, self._asked[task.name][0].ask, "student")
            generate_with(generator, [first], generation, seed=0)  # others need this rank's shards; thrown away
        given = [
            (answer, one.row, f"task {task.name!r}, row {one.slot.row}")
            for one, answer in zip(asked, answers, strict=True)
        ]
        verdicts = verdicts_of(task.verifier, given)
        return [
            answer_line(one.slot, one.prompt, answer, verdict, {})
            for one, answer, verdict in zip(asked, answers, verdicts, strict=True)
        ]


def metrics_of(evaluation: Evaluation, form: str) -> dict[str, float]:
    """Return what is logged of an evaluation: accuracies and their standard errors, and two signs of trouble.

    Args:
        evaluation: what was measured.
        form: of a name, with places for ``task`` and ``value``: ``"eval_{task}_{value}"``.
    """
    found: dict[str, float] = {}
    for name, result in evaluation.results.items():
        values = {
            "accuracy": result.accuracy.value,
            "accuracy_error": result.accuracy.error,
            "unfinished": result.unfinished,
            "tokens": result.tokens or 0.0,
        }
        found |= {form.format(task=name, value=value): number for value, number in values.items()}
    if evaluation.cost is not None:
        found |= {form.format(task="cost", value=name): value for name, value in asdict(evaluation.cost).items()}
    return found


def recorded(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return what the lineage keeps of an evaluation: each task's pass@1 with its interval, and what was asked."""
    return {
        name: {
            "pass@1": asdict(result.accuracy),
            "answers": result.answers,
            "unfinished": result.unfinished,
            "asked": dict(result.asked),
        }
        for name, result in evaluation.results.items()
    }


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and bring every mode and random state back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with random_states_kept():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _of_all(costs: Sequence[Cost]) -> Cost:
    """Add up what ranks took; they take it at the same time, so seconds are the longest."""
    total = sum(costs, Cost())
    return replace(total, seconds=max(one.seconds for one in costs))


def _asks(task: Task) -> Iterator[_Question]:
    """Yield every text that a task asks for."""
    plan = task.plan
    for unit in range(plan.units):
        for number, row in enumerate(plan.rows_of(unit), unit * plan.unit_rows):
            prompt = plan.prompt(row, f"Task {task.name!r}, row {number},")
            for sample in range(task.settings.completions):
                slot = Slot(number, "student", sample)
                yield _Question(slot, prompt, plan.ask(prompt, slot), row)
