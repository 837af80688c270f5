"""Lineage of large checkpoints, written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kd_plugin.lineage.hashing import weight_files

LARGE = 1 << 30  # bytes of weights; less is hashed in about a second


def is_large(checkpoint: Path) -> bool:
    """Whether hashing a checkpoint's weights takes long enough to be worth a thread."""
    return sum(path.stat().st_size for path in weight_files(checkpoint)) >= LARGE


class Background:
    """One thread that does one thing after another.

    Until the record is there the checkpoint says that it is unfinished, so a run that dies meanwhile leaves nothing
    wrong. An interpreter that ends waits for the thread.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="license-lineage")
        self._running.append(self._pool.submit(work))

    def wait(self) -> None:
        """Wait until all of it is done.

        Raises:
            Exception: what the work raised.
        """
        running, self._running = self._running, []
        for future in running:
            future.result()
