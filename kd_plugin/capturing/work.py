"""Doing the units of a capture that nobody has done yet, and showing how far it is."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.cache.manifest import NOTHING_TO_SCORE, Settings
from kd_plugin.cache.schema import CapturedRow, Example, Extracted, to_table
from kd_plugin.cache.store import Store
from kd_plugin.capturing.engines import Engine
from kd_plugin.capturing.generating import Request
from kd_plugin.capturing.rows import Row, RowSource
from kd_plugin.capturing.tokenization import Tokenization
from kd_plugin.verifying import Verifier

_LINE_SECONDS = 60.0
logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_TOO_LONG, _UNFINISHED = "prompt too long", "unfinished"


class Progress:
    """Counts rows and tokens.

    Args:
        total: dataset rows to do, those done before included.
        done: rows done before.
        shown: whether anything is shown at all.
        title: what is counted.
    """

    def __init__(self, total: int, done: int, shown: bool, title: str) -> None:
        self._total, self._at_start, self._tokens = total, done, 0
        self._rows: float = done
        self._title = title
        self._bar: Any = None
        self._shown = shown
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(self._title),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} rows"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._rows, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None and self._rows > self._at_start:
            self._line()

    def advance(self, rows: float, tokens: int) -> None:
        """Count ``rows`` more dataset rows, with ``tokens`` tokens; a fraction where a row is done in parts."""
        self._rows += rows
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self._rows, rate=self._rate())
        elif self._shown and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._line()

    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._started, 1e-9):,.0f} tokens/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        left = elapsed * (self._total - self._rows) / max(self._rows - self._at_start, 1e-9)
        print(
            f"{self._title}: {self._rows:.0f}/{self._total} rows, {self._rate()}, {_minutes(left)} left",
            file=sys.stderr,
            flush=True,
        )


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(int(seconds // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"


@dataclass(frozen=True)
class CaptureJob:
    """What turns rows into captured rows; the same in every worker.

    Attributes:
        rows: the dataset.
        tokenization: turns its rows into examples or prompts.
        filter: which completions are kept, or None for all.
    """

    rows: RowSource
    tokenization: Tokenization
    filter: Verifier | None

    def rendered_at(self, moment: str | None) -> CaptureJob:
        """Return the job with a chat template that prints the time ``moment``."""
        return replace(self, tokenization=self.tokenization.rendered_at(moment))


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of the dataset that are done together, what scores them, and the count of what is not kept.

    Attributes:
        rows: the rows.
        first: number of the first one in the dataset.
        job: turns them into examples.
        engine: asks the teacher.
        settings: of the cache.
        bar: counts what is done.
        dropped: rows or completions that are not kept, by reason; counted up.
    """

    rows: Sequence[Row]
    first: int
    job: CaptureJob
    engine: Engine
    settings: Settings
    bar: Progress
    dropped: Counter[str] = field(default_factory=Counter)


def do_units(store: Store, job: CaptureJob, engine: Engine, shown: bool) -> None:
    """Do the units that have no record; wait for those that other workers have."""
    missing = store.missing()
    to_do = sum(store.manifest.rows_of(index)[2] for index in missing)
    with Progress(len(job.rows), len(job.rows) - to_do, shown, "capture") as bar:
        while missing:
            worked = False
            for index in missing:
                claim = store.claim(index)
                if claim is None:
                    continue
                with claim:
                    # It may have been finished between our listing and our claim.
                    if index in store.missing():
                        _do_unit(store, index, job, engine, bar)
                        worked = True
            missing = store.missing()
            if missing and not worked:
                time.sleep(_POLL_SECONDS)


def _do_unit(store: Store, index: int, job: CaptureJob, engine: Engine, bar: Progress) -> None:
    settings = store.manifest.settings
    _, first, count = store.manifest.rows_of(index)
    batch = RowBatch(job.rows.slice(first, count), first, job, engine, settings, bar)
    captured = given_rows(batch) if settings.generation is None else generated_rows(batch)
    dropped = batch.dropped
    if not captured:
        logger.warning("Rows %d to %d: nothing was kept (%s).", first, first + count - 1, _listed(dropped))
    counted = None if settings.generation is None and job.filter is None and not settings.for_student else dropped
    store.commit(
        index,
        to_table(captured, settings.passed, settings.targets),
        input_tokens=sum(len(row.example.input_ids) for row in captured),
        tokens=sum(len(row.targets.counts) for row in captured),
        entries=sum(len(row.targets.ids) for row in captured),
        dropped=counted,
    )


def examples_of(rows: Sequence[Row], first: int, job: CaptureJob, dropped: Counter[str]) -> Iterator[Example]:
    """Yield what is to be scored of rows that hold completions, and count in ``dropped`` what is not."""
    for number, row in enumerate(rows, first):
        where = f"row {number}"
        example = job.tokenization(row, where)
        reason = NOTHING_TO_SCORE if example is None else job.tokenization.why_not(example)
        if reason is None:
            reason = _why_not(job.filter, _given_text(row), row, where)
        if reason is None and example is not None:
            yield example
        else:
            dropped[str(reason)] += 1


def given_rows(unit: RowBatch) -> list[CapturedRow]:
    """Score the completions that the rows hold, and count in ``dropped`` those that are not kept."""
    kept = list(examples_of(unit.rows, unit.first, unit.job, unit.dropped))
    unit.bar.advance(len(unit.rows) - len(kept), 0)
    return _scored([(example, None) for example in kept], unit, 1.0)


def generated_rows(unit: RowBatch) -> list[CapturedRow]:
    """Have the rows' prompts gone on from, and count in ``dropped`` the completions that are not kept."""
    job, engine, settings, dropped, bar = unit.job, unit.engine, unit.settings, unit.dropped, unit.bar
    generation = settings.generation
    assert generation is not None
    requests: list[tuple[int, Request]] = []
    prompts: dict[int, NDArray[np.int32]] = {}
    for number, row in enumerate(unit.rows, unit.first):
        prompt = job.tokenization.prompt(row, f"row {number}")
        prompts[number] = prompt
        room = generation.max_new_tokens
        if settings.max_length is not None:
            room = min(room, settings.max_length - len(prompt))
        if room >= 1 and len(prompt) and engine.written_by is None:  # a student goes on from what it reads itself
            prompt = job.tokenization.asked_of(prompt, row, f"row {number}")
        if room < 1 or not len(prompt):
            dropped[_TOO_LONG if room < 1 else NOTHING_TO_SCORE] += generation.n
            bar.advance(1, 0)
            continue
        requests += [(number, Request.of(prompt, number, j, room)) for j in range(generation.n)]
    found: list[tuple[int, Example, Extracted | None]] = []
    for batch in engine.batches([len(request.prompt) + request.max_new_tokens for _, request in requests]):
        completions = engine.generate([requests[i][1] for i in batch], settings)
        for i, completion in zip(batch, completions, strict=True):
            number, _ = requests[i]
            row = unit.rows[number - unit.first]
            text = job.tokenization.tokenizer.decode(completion.ids, skip_special_tokens=True)
            if not len(completion.ids):
                reason: str | None = NOTHING_TO_SCORE
            elif not completion.finished and not generation.keep_unfinished:
                reason = _UNFINISHED
            else:
                reason = _why_not(job.filter, text, row, f"row {number}")
            passed: Mapping[str, Any] = {**{n: row.get(n) for n in settings.passed}, "text": text}
            if reason is None:
                example = job.tokenization.generated(prompts[number], completion.ids, row, passed)
                reason = job.tokenization.why_not(example)
            if reason is not None:
                dropped[reason] += 1
                continue
            targets = None if completion.targets is None else job.tokenization.kept(completion.targets)
            found.append((i, example, targets))
        bar.advance(len(batch) / generation.n, sum(len(completion.ids) for completion in completions))
    found.sort(key=lambda one: one[0])
    return _scored([(example, targets) for _, example, targets in found], unit, 0.0)


def _scored(examples: list[tuple[Example, Extracted | None]], unit: RowBatch, share: float) -> list[CapturedRow]:
    """Score the examples that have no targets yet; ``share`` is the dataset rows that each counts for."""
    done = [None if targets is None else CapturedRow(example, targets) for example, targets in examples]
    left = [i for i, row in enumerate(done) if row is None]
    for batch in unit.engine.batches([len(examples[i][0].for_teacher.input_ids) for i in left]):
        chosen = [examples[left[i]][0] for i in batch]
        scored = unit.engine.score([example.for_teacher for example in chosen], unit.settings)
        for i, example, targets in zip(batch, chosen, scored, strict=True):
            done[left[i]] = CapturedRow(example, unit.job.tokenization.kept(targets))
        unit.bar.advance(share * len(batch), sum(len(example.input_ids) for example in chosen))
    return [row for row in done if row is not None]


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))


def _why_not(filter: Verifier | None, text: str, row: Row, where: str) -> str | None:
    return None if filter is None else filter.why_not(text, row, where)


def _given_text(row: Row) -> str:
    """Return the text of the completion that a row holds, for the filter: the last turn of a conversation."""
    for column in ("completion", "messages", "conversations", "text"):
        value = row.get(column)
        if isinstance(value, str):
            return value
        if value:
            return str(value[-1].get("content", value[-1].get("value", "")))
    return ""
