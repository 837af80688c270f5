"""Answers on disk: each is written down as it comes, so that a process that is killed loses none and asks none twice.

A directory of a capture of text holds ``asked.json`` (what is asked, and of whom), ``answers/`` with a journal (JSON
lines) for each unit of prompts that is under way and a Parquet file for each that is done, and the dataset that was
selected of them. A line is written at once, by one system call: what was killed in the middle of it is the last one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kd_plugin.cache.files import explained, publish, publish_new, remove_leftovers, seal, temporary_name, unseal
from kd_plugin.errors import CacheCorruptionError, ConfigError
from kd_plugin.text.writers import Answer, Usage

ASKED, ANSWERS = "asked.json", "answers"
_SYNC_SECONDS = 1.0  # a machine that loses power loses the answers of so long; a process that is killed none
_WAY_OUT = "Answers that are there are kept: make room, and run the same command again."
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample", pa.int32()),
        ("teacher_name", pa.string()),
        ("prompt", pa.string()),  # JSON: a text, or messages
        ("response", pa.string()),
        ("reasoning", pa.string()),
        ("ended", pa.string()),
        ("says", pa.string()),
        ("model_said", pa.string()),
        ("tokens_read", pa.int64()),
        ("tokens_written", pa.int64()),
        ("tokens_cached", pa.int64()),
        ("passed", pa.bool_()),
        ("score", pa.float64()),
        ("why_not", pa.string()),
        ("facts", pa.string()),  # JSON: columns that groups are made of
    ]
)


@dataclass(frozen=True)
class Slot:
    """One text that is to be written: for which row of the dataset, by whom, and which of several."""

    row: int
    writer: str
    sample: int


class AnswerStore:
    """The answers of one capture; one process at a time writes.

    Args:
        directory: of the capture.
        asked: what is asked, and of whom; plain values.

    Raises:
        ConfigError: the directory holds another capture, or something else.
        CacheError: it cannot be written.
    """

    def __init__(self, directory: Path, asked: Mapping[str, Any]) -> None:
        self.directory, self._folder = directory, directory / ANSWERS
        self._lock = threading.Lock()
        self._journals: dict[int, int] = {}
        self._synced: dict[int, float] = {}
        with explained(f"Preparing {directory}", _WAY_OUT):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._join(asked)
        remove_leftovers(self._folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out; raises ConfigError where one is at work."""
        lock = FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"Another process captures into {self.directory}. Wait for it; for more speed raise max_concurrency."
            ) from error
        try:
            yield
        finally:
            lock.release()
            for unit in list(self._journals):
                self._close(unit)

    def _join(self, asked: Mapping[str, Any]) -> None:
        path = self.directory / ASKED
        others = [p.name for p in self.directory.iterdir() if p.name not in (ANSWERS, ".lock")]
        if not path.exists():
            if others:
                raise ConfigError(
                    f"{self.directory} holds {others[0]!r} and no capture of text. Choose a new or empty directory."
                )
            made = temporary_name(self.directory, ASKED)
            made.write_bytes(seal(asked))
            publish_new(made, path)
        there = unseal(path, "Choose another directory.")
        wanted = json.loads(json.dumps(asked))
        differing = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{self.directory} holds a capture that asks something else: {key}: {_short(wanted.get(key))} against "
                f"{_short(there.get(key))} there. Choose another directory, or the settings that it has."
            )

    def finished(self, unit: int) -> bool:
        """Whether a unit is verified and stored."""
        return self._table_path(unit).exists()

    def answered(self, unit: int) -> dict[Slot, Answer]:
        """Return the answers that the journal of a unit holds."""
        path = self._journal_path(unit)
        if not path.exists():
            return {}
        found: dict[Slot, Answer] = {}
        data = path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # a process was killed in the middle of a line
            with path.open("rb+") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                usage = values["answer"].pop("usage")
                answer = Answer(**values["answer"], usage=None if usage is None else Usage(**usage))
                found[Slot(**values["slot"])] = answer
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CacheCorruptionError(
                    f"{path}, line {number}, is not as it was written. Delete the line to have it asked again."
                ) from error
        return found

    def add(self, unit: int, slot: Slot, answer: Answer) -> None:
        """Write an answer down; whoever kills this process afterwards does not lose it."""
        line = json.dumps({"slot": asdict(slot), "answer": asdict(answer)}, ensure_ascii=True) + "\n"
        with self._lock, explained(f"Writing an answer into {self.directory}", _WAY_OUT):
            if unit not in self._journals:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._journals[unit] = os.open(self._journal_path(unit), flags, 0o644)
                self._synced[unit] = time.monotonic()
            data = line.encode()
            written = os.write(self._journals[unit], data)
            while written < len(data):  # a disk that is full takes a part, then refuses
                written += os.write(self._journals[unit], data[written:])
            if time.monotonic() - self._synced[unit] > _SYNC_SECONDS:
                os.fsync(self._journals[unit])
                self._synced[unit] = time.monotonic()

    def finish(self, unit: int, table: pa.Table, *, whole: bool = True) -> None:
        """Store what a unit came to: for good, in the place of its journal; or, not ``whole``, until more comes."""
        path = self._table_path(unit) if whole else self._partial_path(unit)
        with explained(f"Storing unit {unit} in {self.directory}", _WAY_OUT):
            made = temporary_name(self._folder, path.name)
            pq.write_table(table, made, compression="zstd")
            publish(made, path)
        with self._lock:
            self._close(unit)
        if whole:
            self._journal_path(unit).unlink(missing_ok=True)
            self._partial_path(unit).unlink(missing_ok=True)

    def table(self, unit: int, columns: list[str] | None = None) -> pa.Table | None:
        """Return what :meth:`finish` stored; None where there is nothing."""
        path = self._table_path(unit) if self.finished(unit) else self._partial_path(unit)
        if not path.exists():
            return None
        try:
            return pq.read_table(path, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise CacheCorruptionError(
                f"{path} cannot be read ({error}). Delete it to have its prompts asked again."
            ) from error

    def _close(self, unit: int) -> None:
        descriptor = self._journals.pop(unit, None)
        if descriptor is not None:
            os.close(descriptor)

    def _journal_path(self, unit: int) -> Path:
        return self._folder / f"unit-{unit:06d}.jsonl"

    def _partial_path(self, unit: int) -> Path:
        return self._folder / f"unit-{unit:06d}.partial.parquet"

    def _table_path(self, unit: int) -> Path:
        return self._folder / f"unit-{unit:06d}.parquet"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
