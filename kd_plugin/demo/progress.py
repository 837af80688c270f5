"""One line for each step of the demo: a bar with time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

_PLAIN_SECONDS = 15.0


class Bar:
    """Shows how far a loop of known length is.

    Args:
        label: what is being done.
        total: number of steps.
        console: where it is shown; a bar needs a terminal, elsewhere a line comes every 15 seconds.
    """

    def __init__(self, label: str, total: int, console: Console) -> None:
        self.label, self.total, self._console = label, total, console
        self._started = self._told = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, to: int, note: str = "") -> None:
        """Show that ``to`` steps are done, with a word about the last one."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=to, note=note)
            return
        now = time.monotonic()
        if now - self._told >= _PLAIN_SECONDS and 0 < to < self.total:
            left = (now - self._started) / to * (self.total - to)
            self._console.print(f"  {self.label} {to}/{self.total} {note} about {left:.0f} s left", highlight=False)
            self._told = now


class TrainerBar(TrainerCallback):
    """Drives a :class:`Bar` from a transformers trainer."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._note = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the newest loss."""
        if logs and "loss" in logs:
            self._note = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self._bar.advance(state.global_step, self._note)


@contextmanager
def training_bar(trainer: Any, label: str, console: Console) -> Iterator[None]:
    """Show a trainer's progress as the demo's own bar instead of the trainer's."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with Bar(label, trainer.args.max_steps, console) as bar:
        trainer.add_callback(TrainerBar(bar))
        yield


def make_console() -> Console:
    """Return the console of the demo: stdout, plain where it is no terminal."""
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())
