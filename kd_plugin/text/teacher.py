"""A teacher that is asked in words, through templates: any writer can be one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd_plugin.cache.targets import Generation
from kd_plugin.lineage.sources import Source
from kd_plugin.settings import built, takes
from kd_plugin.text.local import LocalWriter
from kd_plugin.text.parsing import correction_pattern, parse_correction, parse_evaluation, verdict_pattern
from kd_plugin.text.prompts import Message, Templates, imitating_steps, key_of, steps_of, task_of
from kd_plugin.text.quoting import quoted_lines
from kd_plugin.text.server import ServerWriter, WriterConnection
from kd_plugin.text.teaching import Case, Correction, Evaluation
from kd_plugin.text.writers import REFUSED, Answer, Ask, Usage, Writer, in_order


class PromptedTeacher:
    """A :class:`~kd_plugin.text.teaching.TextTeacher` that asks a writer through templates.

    Args:
        writer: the model.
        name: of the teacher; a part of each request's key.
        max_tokens: of a reply at most.
        temperature: of the sampling; 0 takes the likeliest token.
        guided: hold replies to their form (vLLM's ``structured_outputs``); for small models.
        templates: what it is asked; None takes the package's own, until a run brings others.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        name: str = "teacher",
        max_tokens: int = 1024,
        temperature: float = 0.0,
        guided: bool = False,
        templates: Templates | None = None,
    ) -> None:
        self.writer, self.name, self.guided = writer, name, guided
        self.generation = Generation(max_new_tokens=max_tokens, temperature=temperature)
        self.templates = Templates.load() if templates is None else templates

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.writer!r}, name={self.name!r})"

    @property
    def source(self) -> Source:
        """What this teacher is, known before anything is sent."""
        return self.writer.source

    @property
    def identity(self) -> dict[str, Any]:
        """The writer's, and how replies are sampled."""
        sampling = {"max_tokens": self.generation.max_new_tokens, "sampling_temperature": self.generation.temperature}
        return {**self.writer.identity, **sampling, "guided": self.guided}

    def gate(self, admit: Callable[[Sequence[str]], None]) -> None:
        """Have every name that the writer turns out to have checked before it is used."""
        self.writer.gate(admit)

    def reach(self) -> list[float]:
        """Have a writer that is elsewhere say that it is there.

        Raises:
            LicenseRefusedError: by the name that it gives, it serves what may not teach.
            ServerError: it is away, or does not serve the model.
        """
        check = getattr(self.writer, "check", None)
        if check is not None:
            check()
        return []

    def adopt_templates(self, templates: Templates) -> None:
        """Ask by a run's templates from now on."""
        self.templates = templates

    def evaluate(self, cases: Sequence[Case]) -> list[Evaluation]:
        """Ask for a score and the first wrong step of each response.

        A response that holds words of a reply is read twice, the second time without the steps in which they stand. The
        lower score counts, so that these steps cannot raise it; a reply that says nothing makes both say nothing.
        """
        readings = [self._readings(case) for case in cases]
        flat = [reading for of_one in readings for reading in of_one]
        requests = [self.templates.evaluate.messages({"task": r.task, "steps": r.shown, "key": r.key}) for r in flat]
        answers = iter(self._ask(requests, [verdict_pattern(r.key, r.steps) for r in flat]))
        return [_lowest([reading.evaluation(next(answers)) for reading in of_one]) for of_one in readings]

    def correct(self, cases: Sequence[Case], first_wrong: Sequence[int | None]) -> list[Correction]:
        """Ask for each response anew, or for what should follow the steps that are right."""
        keys = [self._key("correct", case) for case in cases]
        requests, kept = [], []
        for case, step, key in zip(cases, first_wrong, keys, strict=True):
            values = {"task": task_of(case.prompt), "key": key}
            steps = steps_of(case.response)
            right = [] if step is None else steps[: step - 1]
            if right:
                values |= {"kept": quoted_lines(right), "rest": quoted_lines(steps[len(right) :], len(right) + 1)}
                requests.append(self.templates.go_on.messages(values))
            else:
                requests.append(self.templates.rewrite.messages(values | {"response": quoted_lines(steps)}))
            kept.append("".join(right))
        found = []
        # A token has two characters or more, as a rule; the lines around the text, which has four, take some fifty
        room = max((self.generation.max_new_tokens - 50) // 2, 8)
        answers = self._ask(requests, [correction_pattern(key, room) for key in keys])
        for answer, key, before in zip(answers, keys, kept, strict=True):
            text, problem = parse_correction(answer.text, key, finished=answer.finished)
            whole = None if text is None else before + text
            found.append(Correction(whole, answer.text, _why(answer, problem), answer.usage))
        return found

    def _readings(self, case: Case) -> list[_Reading]:
        """Return the requests about one response: whole, and without the steps that hold words of a reply."""
        task, steps = task_of(case.prompt), steps_of(case.response)
        found = [_Reading(task, quoted_lines(steps), self._key("evaluate", case), len(steps))]
        if left_out := imitating_steps(steps, case.prompt):
            shown = quoted_lines(steps, left_out=left_out)
            found.append(_Reading(task, shown, self._key("evaluate without", case), len(steps)))
        return found

    def _ask(self, requests: Sequence[Sequence[Message]], patterns: Sequence[str]) -> list[Answer]:
        asks = []
        for messages, pattern in zip(requests, patterns, strict=True):
            guide = {"structured_outputs": {"regex": pattern}} if self.guided else {}
            asks.append(Ask(messages, self.generation, request=guide))
        return in_order(self.writer, asks)

    def _key(self, purpose: str, case: Case) -> str:
        return key_of(self.name, purpose, task_of(case.prompt), case.response)


@dataclass(frozen=True)
class _Reading:
    """One request to evaluate a response: the task, the lines that are shown, the key, and of how many steps."""

    task: str
    shown: str
    key: str
    steps: int

    def evaluation(self, answer: Answer) -> Evaluation:
        read = parse_evaluation(answer.text, self.key, self.steps, finished=answer.finished)
        return Evaluation(read.score, read.first_wrong, answer.text, _why(answer, read.problem), answer.usage)


def _lowest(readings: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation with the lowest score, or one that says nothing; with the words and tokens of all."""
    lowest = min(readings, key=lambda one: -1.0 if one.score is None else one.score)
    counted = [one.usage for one in readings if one.usage is not None]
    usage = sum(counted, Usage()) if counted else None
    return replace(lowest, reply="\n\n".join(one.reply for one in readings), usage=usage)


def _why(answer: Answer, problem: str) -> str:
    """Return why a reply says nothing; what a server refused, in its own words."""
    return f"the server refused the request: {answer.says}" if answer.ended == REFUSED else problem


@takes(WriterConnection)
class TextServerTeacher(PromptedTeacher):
    """A model behind any server with OpenAI's chat interface: vLLM, SGLang, or a hosted one.

    Nothing is sent until the first case, or :meth:`reach`, so that the license gate comes before.

    Args:
        url: address of the server; see :class:`~kd_plugin.text.server.ServerWriter`.
        max_tokens: of a reply at most.
        temperature: of the sampling; 0 takes the likeliest token.
        guided: hold replies to their form (vLLM's ``structured_outputs``); for small models.

    Raises:
        ConfigError: a setting is out of range, or the url holds credentials.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        guided: bool = False,
        **connection: Any,
    ) -> None:
        writer = ServerWriter(**vars(built(WriterConnection, {"url": url, "model": model, **connection})))
        super().__init__(writer, name=writer.name, max_tokens=max_tokens, temperature=temperature, guided=guided)


class TextLocalTeacher(PromptedTeacher):
    """A transformers model in this process. It cannot be guided, so it must be one that keeps to a form.

    Args:
        model: hub id, local directory, or a loaded model.
        name: how metrics and lineage call it.
        max_tokens: of a reply at most.
        temperature: of the sampling; 0 takes the likeliest token.
        batch_size: replies at once.
        tokenizer: its tokenizer; None reads the model's own.
        dtype: of its weights.
        device: where it computes; it stays there.
        revision: branch, tag or commit of ``model``.
        license: declared licence where none can be discovered.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "teacher",
        max_tokens: int = 1024,
        temperature: float = 0.0,
        batch_size: int = 8,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        license: str | None = None,
    ) -> None:
        writer = LocalWriter(
            model,
            batch_size=batch_size,
            name=name,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            revision=revision,
            license=license,
        )
        super().__init__(writer, name=name, max_tokens=max_tokens, temperature=temperature)
