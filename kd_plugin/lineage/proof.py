"""Whether a record is about the weights beside it, and how large weights are hashed while training goes on.

A record counts as evidence only when the digests of all its subjects are right. Where several nodes write one large
checkpoint to a file system that they share, the writer of the record asks, by a hidden file beside the weights, for
their digests; each other node hashes a share of the files and leaves digests there as they come. The writer takes what
has arrived when it comes to a file, and hashes the file itself otherwise: it waits for nobody, and a node that died or
sees another disk costs time alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_plugin.errors import LineageError
from kd_plugin.lineage.hashing import DIGESTS, Subject, name_in, sha256_file, subjects, weight_files
from kd_plugin.lineage.readings import printable
from kd_plugin.lineage.record import weights_of

LARGE = 1 << 30  # bytes of weights; less is hashed in about a second
_PREFIX = ".kd-digests-"
_WANTED = f"{_PREFIX}wanted"
_MAX_BYTES = 16 << 20
_PATIENCE = 30.0  # seconds that a node waits for the writer to ask
_PAUSE = 0.05  # seconds between two looks


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


@dataclass(frozen=True)
class Place:
    """Where this process stands in a run.

    Attributes:
        node: index of its node.
        nodes: number of nodes.
        leads: whether it is the first process of its node.
    """

    node: int = 0
    nodes: int = 1
    leads: bool = True

    @property
    def leads_run(self) -> bool:
        """Whether it is the first process of all."""
        return self.node == 0 and self.leads

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """Read what torchrun, accelerate and DeepSpeed's launcher set; without them there is one node."""
        try:
            world, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
            local, local_rank = int(environment["LOCAL_WORLD_SIZE"]), int(environment["LOCAL_RANK"])
        except (KeyError, ValueError):
            return cls()
        if local < 1 or world % local:
            return cls()
        return cls(rank // local, world // local, local_rank == 0)


def hash_share(checkpoint: Path, place: Place) -> None:
    """Hash this node's share of a checkpoint, once its writer asks, and leave the digests beside it as they come.

    The weights may still be on their way when a node comes here, so it waits for the writer; it gives up where a
    record is there, or where nobody asks.
    """
    limit = time.monotonic() + _PATIENCE
    while not (checkpoint / _WANTED).is_file():
        if time.monotonic() > limit or (checkpoint / "lineage.json").is_file():
            return
        time.sleep(_PAUSE)
    entries: dict[str, list[Any]] = {}
    lock = threading.Lock()

    def hash_one(path: Path) -> None:
        entry = _entry(path)
        with lock:
            entries[name_in(checkpoint, path)] = entry
            _leave(checkpoint, place, entries)

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        list(pool.map(hash_one, weight_files(checkpoint)[place.node :: place.nodes]))


def _leave(checkpoint: Path, place: Place, entries: Mapping[str, Any]) -> None:
    """Leave digests for the writer; where it is done already, they are taken away again."""
    left = checkpoint / f"{_PREFIX}{place.node}"
    temporary = checkpoint / f"{_PREFIX}{place.node}.tmp"
    temporary.write_text(json.dumps(entries))
    try:
        temporary.replace(left)
    except FileNotFoundError:  # the writer was done, and took it away in this instant
        return
    if not (checkpoint / _WANTED).is_file():
        left.unlink(missing_ok=True)


class Shares:
    """The digests of other nodes, as they arrive. Making one asks for them."""

    def __init__(self, checkpoint: Path, place: Place) -> None:
        self.checkpoint = checkpoint
        self.place = place
        (checkpoint / _WANTED).touch()

    def order(self, files: list[Path]) -> list[Path]:
        """Return the files, this node's share first, so that the other nodes have time for theirs."""
        mine = files[self.place.node :: self.place.nodes]
        return [*mine, *(path for path in files if path not in set(mine))]

    def digest(self, path: Path) -> str:
        """Return a file's sha256: another node's where it hashed the file as it is now, else computed here."""
        name, now = name_in(self.checkpoint, path), path.stat()
        for node in range(self.place.nodes):
            entry = self._of(node).get(name)
            if entry is not None and entry[1:] == [now.st_size, now.st_mtime_ns]:
                return str(entry[0])
        return sha256_file(path)

    def remove(self) -> None:
        """Take the hidden files away; they are of no use once the record is there. What asks for them goes first."""
        (self.checkpoint / _WANTED).unlink(missing_ok=True)
        for path in self.checkpoint.glob(f"{_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _of(self, node: int) -> Mapping[str, Any]:
        path = self.checkpoint / f"{_PREFIX}{node}"
        if node == self.place.node or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return {}
        entries = json.loads(path.read_bytes())
        return entries if isinstance(entries, dict) else {}


def _entry(path: Path) -> list[Any]:
    before = path.stat()
    return [sha256_file(path), before.st_size, before.st_mtime_ns]


@dataclass
class Proofs:
    """Compares records with weights: small ones at once, large ones in the background until :meth:`settle`.

    Attributes:
        may_wait: whether large weights may be hashed while a model is loaded, with :meth:`settle` before training.
        waiting: lineage directories whose weights are being hashed, with what is expected of each file.
    """

    may_wait: bool = False
    waiting: dict[Path, Mapping[Path, str]] = field(default_factory=dict)

    def problem(self, directory: Path, record: Mapping[str, Any], elsewhere: Mapping[str, str]) -> str | None:
        """Return why a record does not speak for the weights beside it, or None.

        Args:
            directory: where the record lies.
            record: the record, whose own digest holds.
            elsewhere: sha256 of weights that are not here, by name, as the hub has them.
        """
        weights = weights_of(directory)
        promised = {str(s.get("path")): (s.get("sha256"), s.get("size")) for s in record["subjects"]}
        try:
            there = {name_in(weights, path): path for path in weight_files(weights)}
        except LineageError as error:
            return str(error)
        if not promised:
            return "it names no weights"
        for name in sorted(there.keys() - promised.keys()):
            return f"it does not know the weight file {printable(name)}"
        for name, (digest, size) in sorted(promised.items(), key=lambda item: item[0]):
            if name not in there and elsewhere.get(name) != digest:
                return f"it names {printable(name)}, which is not here"
            if name in there and there[name].stat().st_size != size:
                return f"{printable(name)} is not of the size that it names"
        expected = {there[name]: str(digest) for name, (digest, _) in promised.items() if name in there}
        if self.may_wait and sum(path.stat().st_size for path in expected) >= LARGE:
            if Place.from_environment().leads_run:  # the others' word is the first process's: one reading a run
                self.waiting[directory] = expected
                for path in expected:
                    DIGESTS.start(path)
            return None
        return _differing(expected, directory)

    def settle(self) -> bool:
        """Wait for what is hashed in the background; whether all of it holds."""
        waiting, self.waiting = self.waiting, {}
        return all(_differing(expected, directory) is None for directory, expected in waiting.items())


def _differing(expected: Mapping[Path, str], directory: Path) -> str | None:
    found = DIGESTS.of(list(expected), f"weights of {printable(directory.name)}")
    for (path, digest), seen in zip(expected.items(), found, strict=True):
        if seen != digest:
            return f"sha256 of {printable(path.name)} is {seen[:16]}..., it names {digest[:16]}..."
    return None


def subjects_of(weights: Path) -> list[Subject]:
    """Hash a checkpoint's weights; where several nodes saved many, with what the other nodes hash meanwhile."""
    place = Place.from_environment()
    if place.nodes == 1 or not weights.is_dir() or not is_large(weights):
        return subjects(weights)
    shares = Shares(weights, place)
    try:
        return subjects(weights, digest=shares.digest, order=shares.order)
    finally:
        shares.remove()
