"""Spread the hashing of one checkpoint over the nodes of a run, without a collective.

Where several nodes write one large checkpoint to a file system that they share, the writer of the record asks, by a
hidden file beside the weights, for their digests; each other node hashes a share of the files and leaves digests there
as they come. The writer takes what has arrived when it comes to a file, and hashes the file itself otherwise: it waits
for nobody, and a node that died or sees another disk costs time alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.lineage.hashing import name_in, sha256_file, weight_files

_PREFIX = ".kd-digests-"
_WANTED = f"{_PREFIX}wanted"
_MAX_BYTES = 16 << 20
_PATIENCE = 30.0  # seconds that a node waits for the writer to ask
_PAUSE = 0.05  # seconds between two looks


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
