"""Asking the writers for all texts of a capture: every server is kept busy, and prompts are held for a few units.

Each writer has a thread that feeds it and writes its answers down. Units that have all their answers are verified in
the calling thread, whose alarms bound the verifiers' time, while the writers go on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kd_plugin.cache.targets import Generation
from kd_plugin.capturing.rows import Row, RowSource
from kd_plugin.capturing.work import Progress
from kd_plugin.errors import DataError, ServerError
from kd_plugin.text.spending import Budget
from kd_plugin.text.store import SCHEMA, AnswerStore, Slot
from kd_plugin.text.voting import Vote
from kd_plugin.text.writers import REFUSED, Answer, Ask, Prompt, Usage, Writer
from kd_plugin.verifying import Verdict, Verifier

logger = logging.getLogger(__name__)
_WINDOW = 16  # units that are under way at once
_LOOK_SECONDS = 0.1  # until a writer without room looks again
_Key = tuple[int, Slot, Ask]


@dataclass(frozen=True)
class Plan:
    """What is asked for each row, and how answers are verified.

    Attributes:
        rows: the dataset.
        unit_rows: rows of a unit.
        generation: how each text is sampled; ``n`` texts a row and writer.
        seed: of the sampling.
        system: system message for prompts that have none.
        verifier: which answers are right, or None.
        vote: how the writers vote, or None.
        facts: columns of the rows that are kept beside the answers.
        draws_alike: whether all writers have the same random numbers, so that a difference between two is more sure.
    """

    rows: RowSource
    unit_rows: int
    generation: Generation
    seed: int
    system: str | None = None
    verifier: Verifier | None = None
    vote: Vote | None = None
    facts: tuple[str, ...] = ()
    draws_alike: bool = False

    @property
    def units(self) -> int:
        """How many units there are."""
        return -(-len(self.rows) // self.unit_rows)

    def rows_of(self, unit: int) -> list[Row]:
        """Return the rows of a unit."""
        first = unit * self.unit_rows
        return list(self.rows.slice(first, min(self.unit_rows, len(self.rows) - first)))

    def prompt(self, row: Row, where: str) -> Prompt:
        """Return what a row asks: its ``prompt``, or its ``messages`` up to the last of the user.

        Raises:
            DataError: it has neither, or no user.
        """
        prompt = row.get("prompt") or row.get("messages") or row.get("conversations")
        if not prompt:
            raise DataError(
                f"{where} has no prompt; it has {', '.join(map(repr, row))}. A teacher that writes needs `prompt`, a "
                "text or messages, or `messages`."
            )
        if isinstance(prompt, str):
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            return [*system, {"role": "user", "content": prompt}] if system else prompt
        if not isinstance(prompt, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in prompt):
            raise DataError(f"{where} has the prompt {str(prompt)[:100]!r}; expected text, or a list of messages.")
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in prompt]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise DataError(f"{where} has messages without one of the user at their end: {str(prompt)[:100]}.")
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def ask(self, prompt: Prompt, slot: Slot) -> Ask:
        """Return the request for one text, with a seed of its own that no order of asking changes."""
        writer = "" if self.draws_alike else slot.writer
        digest = hashlib.sha256(f"{self.seed}/{slot.row}/{writer}/{slot.sample}".encode()).digest()
        return Ask(prompt, self.generation, int.from_bytes(digest[:4], "big") >> 1)


@dataclass
class _Unit:
    rows: list[Row]
    prompts: list[Prompt]
    first: int
    answered: set[Slot]
    left: dict[str, int]  # answers that each writer owes

    def missing(self, writer: str, n: int) -> Iterator[tuple[Slot, Prompt]]:
        for offset, prompt in enumerate(self.prompts):
            for sample in range(n):
                slot = Slot(self.first + offset, writer, sample)
                if slot not in self.answered:
                    yield slot, prompt


@dataclass
class Collection:
    """What is under way.

    Attributes:
        plan: what is asked.
        store: where answers are written down.
        writers: who is asked, each for every row.
        budget: what was spent.
        min_writers: how many must be there; None for all.
        ceiling_reached: whether the ceiling kept something from being asked.
        missing: names of writers that could not be reached, and are not asked any more.
    """

    plan: Plan
    store: AnswerStore
    writers: Sequence[Writer]
    budget: Budget
    min_writers: int | None = None
    ceiling_reached: bool = False
    missing: list[str] = field(default_factory=list)
    _open: dict[int, _Unit] = field(default_factory=dict)
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _whole: queue.Queue[int | None] = field(default_factory=queue.Queue)
    _under_way: dict[str, dict[Slot, Ask]] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _failure: BaseException | None = None
    _next: int = 0

    def run(self, bar: Progress) -> None:
        """Ask for all that is missing, verify and store it, also what there is of units that cannot be whole.

        Raises:
            ServerError: too many writers are away for good, after what was under way is answered; all of it is kept.
            LicenseRefusedError: a server turned out to serve what may not teach.
            DataError: a row has no prompt, or the verifier failed.
        """
        self._count_what_is_there()
        threads = [threading.Thread(target=self._ask, args=(w, bar), name=f"writer-{w.name}") for w in self.writers]
        for thread in threads:
            thread.start()
        try:
            ended = 0
            while ended < len(threads):
                unit = self._whole.get()
                if unit is None:
                    ended += 1
                else:
                    self._finish(unit)
        except BaseException as error:
            self._failure = self._failure or error
        for thread in threads:  # what is under way is answered and written down
            thread.join()
        if self._failure is not None:
            raise self._failure
        for number in sorted(self._open):
            self._finish(number)

    def _count_what_is_there(self) -> None:
        prices = {writer.name: writer.prices for writer in self.writers}
        for unit in range(self.plan.units):
            if self.store.finished(unit):
                columns = ["teacher_name", "tokens_read", "tokens_written", "tokens_cached"]
                stored = self.store.table(unit, columns)
                for row in [] if stored is None else stored.to_pylist():
                    counted = row["tokens_read"] is not None
                    usage = Usage(row["tokens_read"], row["tokens_written"], row["tokens_cached"]) if counted else None
                    self.budget.count(row["teacher_name"], prices[row["teacher_name"]], usage)
            else:
                for slot, answer in self.store.answered(unit).items():
                    self.budget.count(slot.writer, prices[slot.writer], _counted(answer))

    def _ask(self, writer: Writer, bar: Progress) -> None:
        self._under_way[writer.name] = {}
        share = 1 / (len(self.writers) * self.plan.generation.n)
        try:
            for (number, slot, ask), answer in writer.answers(self._feed(writer)):
                self.store.add(number, slot, answer)
                with self._condition:
                    del self._under_way[writer.name][slot]
                    self.budget.settle(writer.name, writer.prices, ask, answer)
                    bar.advance(share, answer.usage.written if answer.usage else 0)
                    unit = self._open[number]
                    self._answered(number, unit, writer.name)
        except ServerError as error:
            self._lose(writer, error)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._whole.put(None)

    def _answered(self, number: int, unit: _Unit, name: str) -> None:
        unit.left[name] -= 1
        if not any(unit.left.values()):
            self._whole.put(number)

    def _lose(self, writer: Writer, error: ServerError) -> None:
        """Go on without a writer, and say so; or fail, where that is not allowed."""
        with self._condition:
            self.missing.append(writer.name)
            left = [one.name for one in self.writers if one.name not in self.missing]
            if len(left) < (len(self.writers) if self.min_writers is None else self.min_writers):
                self._failure = self._failure or error
                return
            for ask in self._under_way.pop(writer.name).values():
                self.budget.release(writer.prices, ask)
            for number, unit in self._open.items():
                owed = unit.left.pop(writer.name)
                if owed and not any(unit.left.values()):
                    self._whole.put(number)
        logger.warning(
            "Teacher %r cannot be reached (%s). The capture goes on with %s; run the same command again to have what "
            "is missing asked.",
            *(writer.name, error, ", ".join(map(repr, left))),
        )

    def _feed(self, writer: Writer) -> Iterator[tuple[_Key, Ask] | None]:
        """Yield what this writer is to be asked; None where it must first answer what it was asked before."""
        for number in range(self.plan.units):
            while (unit := self._enter(number)) is None and self._failure is None:
                if self._is_done(number):
                    break
                if self._under_way[writer.name]:
                    yield None
                else:
                    with self._condition:
                        self._condition.wait(_LOOK_SECONDS)
            if unit is None:
                if self._failure is not None:
                    return
                continue
            for slot, prompt in unit.missing(writer.name, self.plan.generation.n):
                ask = self.plan.ask(prompt, slot)
                while not self._reserve(writer, slot, ask):
                    if self._failure is not None or not self._under_way[writer.name]:
                        self.ceiling_reached |= self._failure is None
                        return
                    yield None
                yield (number, slot, ask), ask

    def _reserve(self, writer: Writer, slot: Slot, ask: Ask) -> bool:
        with self._condition:
            if self._failure is not None or not self.budget.reserve(writer.prices, ask):
                return False
            self._under_way[writer.name][slot] = ask
            return True

    def _enter(self, number: int) -> _Unit | None:
        """Return a unit that is under way, opening it if there is room; None if there is none, or it is done."""
        with self._condition:
            if number in self._open or self._is_done(number) or len(self._open) >= _WINDOW:
                return self._open.get(number)
            rows, first = self.plan.rows_of(number), number * self.plan.unit_rows
            prompts = [self.plan.prompt(row, f"row {first + i}") for i, row in enumerate(rows)]
            answered = set(self.store.answered(number))
            each, had = len(rows) * self.plan.generation.n, Counter(slot.writer for slot in answered)
            left = {one.name: each - had[one.name] for one in self.writers if one.name not in self.missing}
            self._open[number] = unit = _Unit(rows, prompts, first, answered, left)
            if not any(left.values()):
                self._whole.put(number)
            return unit

    def _is_done(self, number: int) -> bool:
        return number in self._done or self.store.finished(number)

    def _finish(self, number: int) -> None:
        unit, answered = self._open[number], self.store.answered(number)
        whole = len(answered) == len(unit.rows) * len(self.writers) * self.plan.generation.n
        self.store.finish(number, self._table(unit, answered), whole=whole)
        with self._condition:
            del self._open[number]
            if not whole:
                self._done.add(number)
            self._condition.notify_all()

    def _table(self, unit: _Unit, answered: Mapping[Slot, Answer]) -> pa.Table:
        order = {writer.name: i for i, writer in enumerate(self.writers)}
        slots = sorted(answered, key=lambda slot: (slot.row, order[slot.writer], slot.sample))
        verdicts = self._verdicts(unit, [(slot, answered[slot]) for slot in slots])
        lines = []
        for slot, verdict in zip(slots, verdicts, strict=True):
            offset = slot.row - unit.first
            facts = {
                n: None if unit.rows[offset].get(n) is None else str(unit.rows[offset][n]) for n in self.plan.facts
            }
            lines.append(answer_line(slot, unit.prompts[offset], answered[slot], verdict, facts))
        return pa.Table.from_pylist(lines, SCHEMA)

    def _verdicts(self, unit: _Unit, answers: list[tuple[Slot, Answer]]) -> list[Verdict]:
        vote = self.plan.vote
        given = [(answer, unit.rows[slot.row - unit.first], f"row {slot.row}") for slot, answer in answers]
        found = verdicts_of(self.plan.verifier, given)
        if vote is None:
            return found
        for row in dict.fromkeys(slot.row for slot, _ in answers):
            mine = [i for i, (slot, answer) in enumerate(answers) if slot.row == row and answer.text.strip()]
            outcome = vote.outcome([(answers[i][0].writer, answers[i][1].text) for i in mine])
            for i, reason in zip(mine, outcome, strict=True):
                if reason is not None and found[i].passed:
                    found[i] = Verdict(False, 0.0, reason)
        return found


def _counted(answer: Answer) -> Usage | None:
    return (answer.usage or Usage()) if answer.ended == REFUSED else answer.usage


def verdicts_of(verifier: Verifier | None, answers: Sequence[tuple[Answer, Row, str]]) -> list[Verdict]:
    """Verify answers, each with its row and the words by which messages call that.

    A refused or empty answer is wrong. Without a verifier all others are right.

    Raises:
        DataError: the verifier itself failed.
    """

    def verdict(one: tuple[Answer, Row, str]) -> Verdict:
        answer, row, where = one
        if answer.ended == REFUSED or not answer.text.strip():
            return Verdict(False, 0.0, None)
        return Verdict(True, 1.0) if verifier is None else verifier.verify(answer.text, row, where)

    if verifier is not None and verifier.waits:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(verdict, answers))
    return [verdict(one) for one in answers]


def answer_line(
    slot: Slot, prompt: Prompt, answer: Answer, verdict: Verdict, facts: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return an answer and its verdict as a row of :data:`~kd_plugin.text.store.SCHEMA`."""
    usage = _counted(answer)
    return {
        "row": slot.row,
        "sample": slot.sample,
        "teacher_name": slot.writer,
        "prompt": json.dumps(prompt, ensure_ascii=False),
        "response": answer.text,
        "reasoning": answer.reasoning,
        "ended": answer.ended,
        "says": answer.says,
        "model_said": answer.model,
        "tokens_read": None if usage is None else usage.read,
        "tokens_written": None if usage is None else usage.written,
        "tokens_cached": None if usage is None else usage.cached,
        "passed": verdict.passed,
        "score": verdict.score,
        "why_not": verdict.reason,
        "facts": json.dumps(facts),
    }
