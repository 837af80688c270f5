"""Building the mapped form of a cache: flat files that training reads without loading them.

Built once from the shards, each verified as it is read, one row group in memory at a time.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from kd_plugin.cache.examples import scored_positions
from kd_plugin.cache.files import explained, sha256_file, sync
from kd_plugin.cache.flat import FlatWriter
from kd_plugin.cache.index import IndexWriter
from kd_plugin.cache.manifest import Manifest, Unit, seal
from kd_plugin.cache.owners import remove, remove_leftovers, temporary_name
from kd_plugin.cache.schema import list_values, read_row_groups
from kd_plugin.cache.targets import Sampled, TopK
from kd_plugin.errors import CacheCorruptionError

MAPPED_VERSION = 1
_CONTENT = re.compile(r"[0-9a-f]{16}")  # names of mapped_directory
# Every batch of rows.arrow costs each process that opens it some 3 kB of descriptions
_BATCH_BYTES = 8 << 20


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
    if isinstance(targets_kept, TopK):
        offsets.discard()  # equally many everywhere: the offsets are multiples of the count
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
