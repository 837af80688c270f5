"""Progress of a capture: a bar on a terminal, one line a minute without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_SECONDS = 60.0


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
