"""Digests of weight files: streaming, in parallel, with bounded memory.

A file that several parts of a run ask for is read once, as long as it does not change.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.errors import LineageError

_CHUNK = 4 << 20
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|ggml|ckpt|distcp|h5|keras|msgpack|npz|ot|pdparams|onnx|tflite)$", re.IGNORECASE
)
# What a trainer keeps beside the weights. DeepSpeed's *_optim_states.pt are not among these: under ZeRO they hold
# the float32 master weights from which zero_to_fp32 rebuilds the model.
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state)([._].*)?$"
)
_CHECKPOINT = re.compile(r"^checkpoint-.+$")
_PATIENCE = 2.0  # seconds of hashing after which it is shown
_LOOK = 0.1  # seconds between two looks
_TICK_NS = 100_000_000  # a file system may give two writes within one tick of its clock the same time
_Key = tuple[str, int, int, int, int, int]


@dataclass(frozen=True, order=True)
class Subject:
    """A weight file of a checkpoint.

    Attributes:
        path: relative to the checkpoint, with forward slashes.
        sha256: digest of its bytes.
        size: bytes.
    """

    path: str
    sha256: str
    size: int


def weight_files(directory: Path) -> list[Path]:
    """List the weight files that belong to a checkpoint, sorted; a checkpoint of a single file is that file.

    Directories below it that are checkpoints of their own (``checkpoint-*``, or holding a ``lineage.json``)
    and hidden ones are left out.

    Raises:
        LineageError: a file's name cannot be written down.
    """
    files = [directory] if directory.is_file() else sorted(_walk(directory))
    for path in files:
        if not name_in(directory, path).isprintable():  # a record could not name it, and a terminal should not print it
            raise LineageError(
                f"The weight file {path.name!a} has a name that is not plain text; rename it and save again."
            )
    return files


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory is called as trainers call the checkpoints of a run."""
    return _CHECKPOINT.match(name) is not None


def weights_aside(directory: Path) -> list[Path]:
    """List weight files below a checkpoint that belong to it by their place and to no record: sorted, links followed.

    They lie in a hidden, linked or oddly named directory, or in a directory whose own ``lineage.json`` does not name
    them. What a trainer keeps of its optimizer is left out.
    """
    if not directory.is_dir():
        return []
    own = set(weight_files(directory))
    found = []
    for folder, names, files in os.walk(directory, followlinks=True):
        place = Path(folder)
        names[:] = [n for n in sorted(names) if not _leads_back(place / n)]
        claimed = _claimed(place, directory)
        for name in sorted(files):
            path = place / name
            if path in own or not _WEIGHTS.match(name) or _NOT_WEIGHTS.match(name) or not path.is_file():
                continue
            of_optimizer = name.endswith((".distcp", ".pt")) and any(
                _NOT_WEIGHTS.match(part) for part in place.relative_to(directory).parts
            )
            if not of_optimizer and path not in claimed:
                found.append(path)
    return found


def _claimed(place: Path, root: Path) -> set[Path]:
    """Return the weights that a record in ``place``, or above it and below the checkpoint, names by name and size."""
    from kd_plugin.lineage.record import RECORD, read_record

    claimed: set[Path] = set()
    for folder in (place, *place.parents):
        if folder == root or not folder.is_relative_to(root):
            break
        if (folder / RECORD).is_file():
            try:
                subjects, _ = read_record(folder / RECORD)
                named = {folder / str(s["path"]): s["size"] for s in subjects["subjects"]}
            except (LineageError, KeyError, TypeError):
                continue
            claimed |= {path for path, size in named.items() if path.is_file() and path.stat().st_size == size}
    return claimed


def _leads_back(path: Path) -> bool:
    """Whether a link leads to a directory that holds it, so that following it would not end."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def apart(directory: Path) -> list[str]:
    """Name the directories below a checkpoint that hold a lineage of their own and are no ``checkpoint-*``."""
    if not directory.is_dir():
        return []
    below = (path.parent.relative_to(directory) for path in sorted(directory.rglob("lineage.json")))
    return [place.as_posix() for place in below if place.parts and not any(map(_CHECKPOINT.match, place.parts))]


def subjects(
    directory: Path,
    workers: int | None = None,
    digest: Callable[[Path], str] | None = None,
    order: Callable[[list[Path]], list[Path]] | None = None,
) -> list[Subject]:
    """Hash every weight file of a checkpoint, as many at a time as there are cores.

    Args:
        directory: the checkpoint.
        workers: files at a time; None is the number of cores.
        digest: returns a file's sha256; None reads the file.
        order: sorts the files by which comes first; None begins with the largest, so that none is left over alone.
    """
    files = weight_files(directory)
    files = order(files) if order is not None else sorted(files, key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(workers or min(32, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest or sha256_file, files))
    return sorted(
        Subject(name_in(directory, path), digest, path.stat().st_size)
        for path, digest in zip(files, digests, strict=True)
    )


def name_in(checkpoint: Path, file: Path) -> str:
    """Return how a record names a weight file: relative to its directory, with forward slashes."""
    return file.name if file == checkpoint else file.relative_to(checkpoint).as_posix()


def sha256_file(path: Path, count: Callable[[int], None] | None = None) -> str:
    """Hash a file without holding more than 4 MiB of it; hashlib releases the GIL meanwhile.

    Args:
        path: the file.
        count: told of the bytes as they are read.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(view[:read])
            if count is not None:
                count(read)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hash a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _walk(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        name = path.name
        if path.is_dir():
            if path.is_symlink() or name.startswith(".") or _CHECKPOINT.match(name) or _NOT_WEIGHTS.match(name):
                continue
            if not (path / "lineage.json").exists():
                yield from _walk(path)
        elif _WEIGHTS.match(name) and not _NOT_WEIGHTS.match(name) and path.is_file():  # a pipe would block
            yield path


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
