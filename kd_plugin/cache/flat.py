"""Flat files of equal items, which training maps into memory, and their checksums."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.cache.files import sync

BLOCK_BYTES = 256 << 10


@dataclass(frozen=True)
class FlatFile:
    """A file of equal items, and its digests.

    Attributes:
        name: in the mapped directory.
        items: how many.
        dtype: NumPy's name of an item's type.
        sha256: of the whole file.
        checks_sha256: of the file ``<name>.crc``, which holds the CRC-32 of every 256 KiB block; None for a file
            that is only checked whole.
    """

    name: str
    items: int
    dtype: str
    sha256: str
    checks_sha256: str | None


class FlatWriter:
    """Appends arrays to a flat file and takes the checksum of each block."""

    def __init__(self, directory: Path, name: str, dtype: str) -> None:
        self._path = directory / name
        self._dtype = np.dtype(dtype)
        self._file = open(self._path, "wb")  # noqa: SIM115  closed in finish()
        self._digest = hashlib.sha256()
        self._pending = b""
        self._checks: list[int] = []
        self._items = 0

    def append(self, array: NDArray[Any]) -> None:
        """Add the items of an array (N,)."""
        data = np.ascontiguousarray(array, self._dtype).tobytes()
        self._items += len(array)
        self._file.write(data)
        self._digest.update(data)
        data = self._pending + data
        whole = len(data) - len(data) % BLOCK_BYTES
        view = memoryview(data)
        self._checks += [zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, whole, BLOCK_BYTES)]
        self._pending = data[whole:]

    def discard(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink()

    def finish(self, with_checks: bool = True) -> FlatFile:
        """Bring the file to the disk, read-only; return its record."""
        if self._pending:
            self._checks.append(zlib.crc32(self._pending))
        self._file.close()
        sync(self._path)
        self._path.chmod(0o444)
        whole = self._digest.hexdigest()
        if not with_checks:
            return FlatFile(self._path.name, self._items, self._dtype.str, whole, None)
        checks = np.asarray(self._checks, "<u4").tobytes()
        checks_path = self._path.with_name(self._path.name + ".crc")
        checks_path.write_bytes(checks)
        sync(checks_path)
        checks_path.chmod(0o444)
        return FlatFile(self._path.name, self._items, self._dtype.str, whole, hashlib.sha256(checks).hexdigest())
