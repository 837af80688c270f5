"""Building the mapped form of a cache: flat files that training reads without loading them.

Built once from the shards, each verified as it is read, one row group in memory at a time. The index (which row has the
tokens of a given hash) is sorted on the disk, so that many millions of examples take no memory that grows with them but
for 1 to 2 bytes an example.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kd_plugin.cache.files import explained, remove, remove_leftovers, seal, sync, temporary_name
from kd_plugin.cache.manifest import Manifest, Unit
from kd_plugin.cache.schema import list_values, read_row_groups, scored_positions
from kd_plugin.cache.targets import Sampled
from kd_plugin.errors import CacheCorruptionError
from kd_plugin.lineage.hashing import sha256_file

BLOCK_BYTES = 256 << 10
_BUCKET_ROWS = 4  # entries a bucket, on average
# An entry is a key and its row number, both big-endian, so that bytes sort as numbers
_KEY_BYTES = 16
_ENTRY_BYTES = 24
_CHUNK = 1 << 16  # entries in memory at a time
MAPPED_VERSION = 1
_CONTENT = re.compile(r"[0-9a-f]{16}")  # names of mapped_directory
# Every batch of rows.arrow costs each process that opens it some 3 kB of descriptions
_BATCH_BYTES = 8 << 20


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


def mapped_directory(cache: Path, manifest: Manifest, mapped_dir: str | Path | None) -> Path:
    """Return where the mapped form of exactly these shards is."""
    root = cache / "mapped" if mapped_dir is None else Path(mapped_dir)
    return root / manifest.content_digest[:16]


def build(cache: Path, manifest: Manifest, final: Path) -> None:
    """Build the mapped form at ``final`` unless it is there; other processes wait for the one that builds.

    Raises:
        CacheCorruptionError: a shard is not what the manifest promises.
        CacheError: the directory cannot be written.
    """
    way_out = (
        "The cache itself is untouched. Give a directory that can be written: TeacherCache(path, mapped_dir=...), "
        "or open the cache once where it can."
    )
    with explained(f"Building the memory-mapped form of {cache} in {final.parent}", way_out):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final.parent / ".lock"):
            if final.exists():
                return
            # Older contents, and what killed builds left. A lock may hold for one host alone, or for none: another
            # process may be building here.
            for older in final.parent.iterdir():
                if _CONTENT.fullmatch(older.name):
                    remove(older)
            remove_leftovers(final.parent)
            temporary = temporary_name(final.parent, final.name)
            temporary.mkdir()
            try:
                _write(cache, manifest, temporary)
                sync(temporary)
                try:
                    os.rename(temporary, final)
                except OSError:
                    if not final.exists():  # else another process was quicker: its files have the same content
                        raise
                sync(final.parent)
            finally:
                remove(temporary)


def row_schema(passed: tuple[str, ...]) -> pa.Schema:
    """Return the columns of ``rows.arrow``, which :meth:`TeacherCache.dataset` hands out."""
    fields = [
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.int8())),
        ("teacher_index", pa.list_(pa.int64())),
        ("example_id", pa.string()),
        *((name, pa.string()) for name in passed),
    ]
    return pa.schema([pa.field(name, kind) for name, kind in fields])


def verify_shard(cache: Path, unit: Unit, whole: bool = True) -> Path:
    """Compare a shard with its record, byte for byte or by size alone, and return its path.

    Raises:
        CacheCorruptionError: it is missing or differs; says which rows are lost and how to redo just those.
    """
    path = cache / unit.file
    record = cache / "units" / f"{unit.index:05d}.json"
    redo = f"Lost: {unit.rows_lost}. To redo just those, delete {path} and {record} and run the same capture again."
    if not path.is_file():
        raise CacheCorruptionError(f"{path} is missing. {redo}")
    if path.stat().st_size != unit.bytes:
        raise CacheCorruptionError(f"{path} has {path.stat().st_size} bytes; {unit.bytes} were written. {redo}")
    if whole and sha256_file(path) != unit.sha256:
        raise CacheCorruptionError(f"{path} was changed: its sha256 is not that of the manifest. {redo}")
    return path


def _write(cache: Path, manifest: Manifest, directory: Path) -> None:
    passed, targets_kept = manifest.settings.passed, manifest.settings.targets
    writers = {
        "target_ids": FlatWriter(directory, "ids.bin", "<i4"),
        "tail_logmass": FlatWriter(directory, "tail.bin", "<f4"),
    }
    if isinstance(targets_kept, Sampled):
        writers["target_draws"] = FlatWriter(directory, "draws.bin", "<i2")
    if isinstance(targets_kept, Sampled) and targets_kept.logprobs == "mean":
        writers["mean_logprob"] = FlatWriter(directory, "mean_logprob.bin", "<f4")
    else:
        writers["target_logprobs"] = FlatWriter(directory, "logprobs.bin", "<f2")
    offsets = FlatWriter(directory, "offsets.bin", "<i8")
    offsets.append(np.zeros(1, np.int64))
    index = IndexWriter(directory)
    targets = entries = 0
    (directory / "rows").mkdir()
    rows_path = directory / "rows" / "rows.arrow"
    schema = row_schema(passed)
    waiting: list[pa.Table] = []
    waiting_bytes = 0
    with pa.OSFile(str(rows_path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for unit in manifest.units:
            path = verify_shard(cache, unit)
            for table in read_row_groups(path, manifest.settings.digest, unit.index, unit.rows_lost):
                waiting.append(_rows(table, schema, targets))
                waiting_bytes += waiting[-1].nbytes
                if waiting_bytes >= _BATCH_BYTES:
                    stream.write_table(pa.concat_tables(waiting).combine_chunks())
                    waiting, waiting_bytes = [], 0
                index.append(table["example_id"].to_pylist())
                counts, _ = list_values(table["target_counts"])
                offsets.append(entries + np.cumsum(counts, dtype=np.int64))
                targets, entries = targets + len(counts), entries + int(counts.sum())
                for name, writer in writers.items():
                    writer.append(list_values(table[name])[0])
        if waiting:
            stream.write_table(pa.concat_tables(waiting).combine_chunks())
    sync(rows_path)
    files = [writer.finish() for writer in writers.values()]
    if manifest.settings.lists_equally_many:
        offsets.discard()  # the offsets are multiples of the count
    else:
        files.append(offsets.finish())
    files += index.finish()
    record = {
        "version": MAPPED_VERSION,
        "content": manifest.content_digest,
        "rows_sha256": sha256_file(rows_path),
        "files": [asdict(file) for file in files],
    }
    (directory / "mapped.json").write_bytes(seal(record))
    sync(directory / "mapped.json")


def _rows(table: pa.Table, schema: pa.Schema, first_target: int) -> pa.Table:
    """Add the per-token column ``teacher_index`` to the rows of a row group."""
    masks, lengths = list_values(table["completion_mask"])
    starts = np.cumsum(lengths) - lengths
    index = np.full(len(masks), -1, np.int64)
    for start, length in zip(starts, lengths, strict=True):
        at = start + scored_positions(masks[start : start + length])
        index[at] = first_target + np.arange(len(at))
        first_target += len(at)
    offsets = pa.array(np.append(starts, len(masks)), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.array(index))
    columns = [column if name == "teacher_index" else table[name] for name in schema.names]
    return pa.table(columns, names=schema.names).cast(schema)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the operating system releases when the process dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            import errno

            # A file system without locks: two processes may then build at once, and the first to finish stands.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield
