"""The index of a cache: which row has the tokens of a given hash.

Keys are sorted on the disk, so that building the index of many millions of examples takes no memory that grows with
them but for 1 to 2 bytes an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.cache.flat import FlatFile, FlatWriter

_BUCKET_ROWS = 4  # entries a bucket, on average
# An entry is a key and its row number, both big-endian, so that bytes sort as numbers
_KEY_BYTES = 16
_ENTRY_BYTES = 24
_CHUNK = 1 << 16  # entries in memory at a time


class IndexWriter:
    """Collects the ids of examples in a file, and turns them into a sorted index.

    Args:
        directory: of the mapped form.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._unsorted = directory / "index.unsorted"
        self._file = open(self._unsorted, "wb")  # noqa: SIM115  closed in finish()
        self._rows = 0

    def append(self, example_ids: Sequence[str]) -> None:
        """Add examples, 32 hexadecimal digits each, in the order of their rows."""
        entries = np.empty((len(example_ids), _ENTRY_BYTES), np.uint8)
        keys = np.frombuffer(bytes.fromhex("".join(example_ids)), np.uint8)
        entries[:, :_KEY_BYTES] = keys.reshape(-1, _KEY_BYTES)
        rows = np.arange(self._rows, self._rows + len(example_ids), dtype=">i8")
        entries[:, _KEY_BYTES:] = rows.view(np.uint8).reshape(len(rows), -1)
        self._file.write(entries.tobytes())
        self._rows += len(example_ids)

    def finish(self) -> list[FlatFile]:
        """Sort, and write keys, rows, and where each bucket of the keys' leading bits begins."""
        self._file.close()
        keys, rows, buckets = (
            FlatWriter(self._directory, f"index_{name}.bin", dtype)
            for name, dtype in (("keys", "<u8"), ("rows", "<i8"), ("buckets", "<i8"))
        )
        bits = bucket_bits(self._rows)
        counts = np.zeros(2**bits, np.int64)
        for entries in self._sorted():
            key = entries[:, :_KEY_BYTES].copy().view(">u8").astype(np.uint64)
            keys.append(key.ravel())
            rows.append(entries[:, _KEY_BYTES:].copy().view(">i8").ravel())
            bucket = leading_bits(key[:, 0], bits).astype(np.int64)
            counts[bucket[0] : bucket[-1] + 1] += np.bincount(bucket - bucket[0])
        buckets.append(np.zeros(1, np.int64))
        buckets.append(np.cumsum(counts, out=counts))
        self._unsorted.unlink()
        return [writer.finish(with_checks=False) for writer in (keys, rows, buckets)]

    def _sorted(self) -> Iterator[NDArray[Any]]:
        """Sort the file where it lies, and yield its entries (N, 24) in order; equal keys by row."""
        if not self._rows:
            return
        entries = np.memmap(self._unsorted, np.uint8, "r+", shape=(self._rows, _ENTRY_BYTES))
        entries.view(f"V{_ENTRY_BYTES}").ravel().sort()  # raw bytes compare as unsigned numbers from the first on
        for first in range(0, self._rows, _CHUNK):
            yield np.asarray(entries[first : first + _CHUNK])


def bucket_bits(rows: int) -> int:
    """Return the number of leading key bits that choose a bucket of an index over ``rows`` rows."""
    return max(0, (rows // _BUCKET_ROWS).bit_length() - 1)


def leading_bits(keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Return the bucket of each key."""
    return keys >> np.uint64(64 - bits) if bits else np.zeros_like(keys)
