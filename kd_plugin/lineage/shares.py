"""Spread the hashing of one checkpoint over the nodes of a run, without a collective.

Where several nodes write one checkpoint to a file system that they share, each hashes a share of its files and leaves
the digests in a hidden file there. The writer of the record takes what has arrived when it comes to a file, and hashes
the file itself otherwise: it waits for nobody, and a node that died or sees another disk costs time alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.lineage.hashing import name_in, sha256_file, weight_files

_PREFIX = ".kd-digests-"
_MAX_BYTES = 16 << 20


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
    """Hash this node's share of a checkpoint's weight files, and leave the digests beside them."""
    mine = weight_files(checkpoint)[place.node :: place.nodes]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_entry, mine))
    entries = {name_in(checkpoint, path): entry for path, entry in zip(mine, digests, strict=True)}
    temporary = checkpoint / f"{_PREFIX}{place.node}.tmp"
    temporary.write_text(json.dumps(entries))
    temporary.replace(checkpoint / f"{_PREFIX}{place.node}")


class Shares:
    """The digests of other nodes, as they arrive."""

    def __init__(self, checkpoint: Path, place: Place) -> None:
        self.checkpoint = checkpoint
        self.place = place

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
        """Take the hidden files away; they are of no use once the record is there."""
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
