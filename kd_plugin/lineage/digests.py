"""Digests of large files that several parts of a run ask for: each is read once, as long as it does not change."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from kd_plugin.lineage.hashing import sha256_file

_PATIENCE = 2.0  # seconds of hashing after which it is shown
_LOOK = 0.1  # seconds between two looks
_TICK_NS = 100_000_000  # a file system may give two writes within one tick of its clock the same time
_Key = tuple[str, int, int, int, int, int]


class Digests:
    """The sha256 of files by path, size and times; a file that changes is read again.

    A file that was written just before it was hashed is not kept: a further write within the same tick of the file
    system's clock would not show in its times.
    """

    def __init__(self) -> None:
        self._known: dict[_Key, Future[str]] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self.bytes_read = 0

    def start(self, path: Path) -> Future[str]:
        """Begin to hash a file, as many at a time as there are cores; a file that is known is not read again."""
        key = _key(path)
        with self._lock:
            if key not in self._known:
                if self._pool is None:
                    workers = min(32, os.cpu_count() or 1)
                    self._pool = ThreadPoolExecutor(workers, thread_name_prefix="license-digests")
                self._known[key] = self._pool.submit(self._read, path, key)
            return self._known[key]

    def of(self, paths: Sequence[Path], title: str) -> list[str]:
        """Return the sha256 of files; above two seconds a bar on standard error shows how far it is.

        Args:
            paths: the files.
            title: what they are, for the bar.

        Raises:
            OSError: a file cannot be read.
        """
        futures = [self.start(path) for path in paths]
        begun, at_start = time.monotonic(), self.bytes_read
        bar: Any = None
        while wait(futures, timeout=_LOOK).not_done:
            if bar is None and time.monotonic() - begun > _PATIENCE:
                bar = _bar(title, sum(path.stat().st_size for path in paths))
            if bar is not None:
                bar.update(bar.task_ids[0], completed=self.bytes_read - at_start)
        if bar is not None:
            bar.stop()
        return [future.result() for future in futures]

    def _read(self, path: Path, key: _Key) -> str:
        try:
            digest = sha256_file(path, self._count)
            fresh = time.time_ns() - max(key[4], key[5]) < _TICK_NS
            if fresh or _key(path) != key:
                self._forget(key)
        except BaseException:
            self._forget(key)
            raise
        return digest

    def _forget(self, key: _Key) -> None:
        with self._lock:
            self._known.pop(key, None)

    def _count(self, read: int) -> None:
        with self._lock:
            self.bytes_read += read


DIGESTS = Digests()  # of this process: a run, and the runs after it


def _key(path: Path) -> _Key:
    real = path.resolve()
    now = real.stat()
    return (str(real), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def _bar(title: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{title}: hashing {total / 2**30:.1f} GiB", file=sys.stderr, flush=True)
    bar = Progress(TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console)
    bar.add_task(title, total=total)
    bar.start()
    return bar
