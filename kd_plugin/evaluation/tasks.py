"""Tasks: a file of questions, how each is asked, and the verifier that says which answers are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_plugin.cache.targets import Generation
from kd_plugin.capturing.rows import RowSource, open_rows
from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.evaluation.benchmarks import benchmark, benchmark_rows
from kd_plugin.inputs import load_rows, read_yaml
from kd_plugin.settings import option, require_types, settings
from kd_plugin.text.collecting import Plan
from kd_plugin.verifying import Verifier, make_verifier

_UNIT = 64  # questions that are asked and stored together


@settings
class TaskSettings:
    """A task: its questions, how they are asked, and what is right.

    Raises:
        ConfigError: a number is out of range.
    """

    rows: str = option(
        default="",
        help="Your own questions: a .jsonl, .json or .parquet file, a directory of `save_to_disk`, or a hub id; rows "
        "with `prompt` (a text or messages) or `messages`. Of a benchmark, a local copy of its file.",
    )
    benchmark: str | None = option(
        default=None, help="A known set in the place of your own: aime24, math_500, gpqa or lcb (LiveCodeBench)."
    )
    verify: Any = option(
        default=None,
        help="Which answers are right: exact, contains, math_verify, package.module:function, a mapping with kind "
        "(also regex and tests) and its settings, or a list of which all must accept; left out, math_verify, or what "
        "the benchmark needs.",
    )
    answer_column: str = option(default="answer", help="Column of the reference answer.")
    completions: int = option(default=4, help="Answers to each question; pass@1 is their mean.")
    max_new_tokens: int = option(default=2048, help="Tokens of an answer at most, reasoning included.")
    sampling_temperature: float = option(default=0.6, help="Temperature; 0 takes the likeliest token.")
    sampling_top_p: float = option(default=0.95, help="Sample from the likeliest tokens that reach this mass.")
    sampling_top_k: int = option(default=0, help="Sample from the k likeliest tokens; 0 from all.")
    system: str | None = option(default=None, help="System message before prompts that have none.")
    seed: int = option(default=0, help="Of the sampling.")
    split: str = option(default="test", help="Split of a dataset that has several.")
    dataset_name: str | None = option(default=None, help="Configuration of a hub dataset.")
    limit: int | None = option(default=None, help="Ask the first so many questions alone.")

    def __post_init__(self) -> None:
        if self.benchmark is not None:
            benchmark(self.benchmark)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; expected at least 1.")
        if self.completions > 1 and self.sampling_temperature == 0:
            raise ConfigError(
                f"completions is {self.completions} at sampling_temperature 0: all answers would be the same one. Set "
                "completions: 1, or a temperature."
            )
        _ = self.generation

    @property
    def generation(self) -> Generation:
        """How each answer is sampled."""
        sampling = (self.sampling_temperature, self.sampling_top_p, self.sampling_top_k)
        return Generation(self.completions, self.max_new_tokens, *sampling)


@dataclass(frozen=True)
class Task:
    """A task under its name.

    Attributes:
        name: of the task, and of its directory.
        settings: its questions, and how they are asked.
    """

    name: str
    settings: TaskSettings

    @cached_property
    def verifier(self) -> Verifier:
        """What says which answers are right.

        Raises:
            ConfigError: one that cannot be found.
        """
        asked = self.settings
        usual = "math_verify" if asked.benchmark is None else benchmark(asked.benchmark).verify
        found = make_verifier(usual if asked.verify is None else asked.verify, asked.answer_column)
        assert found is not None
        return found

    @cached_property
    def questions(self) -> RowSource:
        """The rows, with the columns that the verifier reads.

        Raises:
            DataError: they cannot be read, or there are none.
        """
        asked = self.settings
        if asked.benchmark is not None:
            rows = benchmark_rows(asked.benchmark, asked.rows or None)
        else:
            rows = load_rows(asked.rows, split=asked.split, name=asked.dataset_name)
        if asked.limit is not None:
            rows = rows.select(range(min(asked.limit, len(rows))))
        return open_rows(rows, _UNIT, self.verifier.columns)

    @cached_property
    def plan(self) -> Plan:
        """What is asked."""
        asked = self.settings
        return Plan(self.questions, _UNIT, asked.generation, asked.seed, asked.system, self.verifier, draws_alike=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the answers; two evaluations that have it in common asked the same."""
        kept = dataclasses.asdict(self.settings)
        for place in ("rows", "split", "dataset_name", "verify", "limit"):
            kept.pop(place)
        return {**kept, "questions": self.questions.fingerprint(), "verifier": self.verifier.name}


def load_tasks(given: Mapping[str, Any] | str | Path) -> list[Task]:
    """Read tasks: ``tasks``, a mapping from name to the settings of one, beside defaults for all of them.

    Args:
        given: the mapping, or a YAML file that holds it.

    Raises:
        ConfigError: no task, an unknown key, or what a task refuses.
    """
    if not isinstance(given, Mapping | str | Path):
        raise ConfigError(f"tasks: expected a mapping, or a YAML file that holds it; found {given!r}.")
    where = "tasks" if isinstance(given, Mapping) else str(given)
    content = dict(given) if isinstance(given, Mapping) else read_yaml(given)
    known = [field.name for field in dataclasses.fields(TaskSettings)]
    tasks = content.pop("tasks", None)
    require_known_keys(content, known, f"{where}, beside `tasks`")
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError(f"{where}: expected `tasks`, a mapping such as {{mine: {{rows: questions.jsonl}}}}.")
    found = []
    for name, own in tasks.items():
        label = f"{where}, task {name!r}"
        options = {"rows": own} if isinstance(own, str) else own
        if not isinstance(options, Mapping):
            raise ConfigError(f"{label}: expected a file of questions, or a mapping with `rows`; found {own!r}.")
        require_known_keys(options, known, label)
        if not {"rows", "benchmark"} & {*options, *content}:
            raise ConfigError(f"{label}: `rows` is missing, the file of its questions; or name a `benchmark`.")
        try:
            require_task_name(str(name))
            require_types(TaskSettings, {**content, **options})
            found.append(Task(str(name), TaskSettings(**{**content, **options})))
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from error
    return found


def require_task_name(name: str) -> None:
    """Refuse a name that is no plain name of a directory: answers are read and written under it.

    Raises:
        ConfigError: it has a separator or begins with a dot.
    """
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise ConfigError(f"A task is named {name!r}, and its directory too; leave out slashes and a leading dot.")
