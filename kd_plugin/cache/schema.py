"""A row of a cache: an example, its targets, and their Parquet form, checked when it is read.

The same rows give the same bytes whoever writes them (with one version of Arrow): no dates, no host, fixed
writer options. Ids and log-probabilities are split into byte streams before zstd, which reaches the size of
hand-made bit packing. Pages carry checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kd_plugin.cache.targets import Sampled, Targets
from kd_plugin.errors import CacheCorruptionError

METADATA_SETTINGS, METADATA_UNIT = b"kd_plugin.settings", b"kd_plugin.unit"
_IN_ORDER = 8  # tokens of a truncated target that stand by falling probability
_ROW_GROUP = 128  # rows: the most that is in memory when a shard is read
_SPLIT = ("input_ids", "target_ids", "target_logprobs", "mean_logprob", "tail_logmass")
_DICTIONARY = ("completion_mask", "target_counts", "target_draws")


@dataclass(frozen=True)
class CapturedRow:
    """An example with its targets.

    Attributes:
        example: what was scored.
        targets: the targets of its scored positions, in order.
    """

    example: Example
    targets: Extracted


def shard_schema(passed: Sequence[str], targets: Targets) -> pa.Schema:
    """Return the columns of a shard; see docs/teacher-cache.md for their meaning."""
    fields = [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("target_counts", pa.list_(pa.int32()), nullable=False),
        pa.field("target_ids", pa.list_(pa.int32()), nullable=False),
        _logprobs_field(targets),
        pa.field("tail_logmass", pa.list_(pa.float32()), nullable=False),
    ]
    if isinstance(targets, Sampled):
        fields.append(pa.field("target_draws", pa.list_(pa.uint16()), nullable=False))
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in passed)])


def to_table(rows: Sequence[CapturedRow], passed: Sequence[str], targets: Targets) -> pa.Table:
    """Lay ``rows`` out as a table of :func:`shard_schema`."""
    schema = shard_schema(passed, targets)
    ordered = [row.targets if isinstance(targets, Sampled) else _in_stored_order(row.targets) for row in rows]
    columns: dict[str, Any] = {
        "example_id": [row.example.example_id for row in rows],
        "input_ids": _lists([row.example.input_ids for row in rows], pa.int32()),
        "completion_mask": _lists([row.example.completion_mask for row in rows], pa.int8()),
        "target_counts": _lists([row.targets.counts for row in rows], pa.int32()),
        "target_ids": _lists([kept.ids for kept in ordered], pa.int32()),
        "target_logprobs": _lists([kept.logprobs for kept in ordered], pa.float16()),
        "tail_logmass": _lists([row.targets.tail_logmass for row in rows], pa.float32()),
    }
    if isinstance(targets, Sampled):
        columns["target_draws"] = _lists([_require(row.targets.draws) for row in rows], pa.uint16())
        columns["mean_logprob"] = _lists([_require(row.targets.mean_logprob) for row in rows], pa.float32())
    for name in passed:
        columns[name] = [row.example.passed.get(name) for row in rows]
    kept = [columns[name] for name in schema.names]
    return pa.table([pa.array(c) if isinstance(c, list) and not c else c for c in kept], schema=schema)


def write_shard(path: Path, table: pa.Table, settings_digest: str, unit: int) -> None:
    """Write ``table`` to ``path`` with the fixed options, naming the cache and the unit that it belongs to."""
    metadata = {METADATA_SETTINGS: settings_digest.encode(), METADATA_UNIT: str(unit).encode()}
    table = table.replace_schema_metadata(metadata)
    leaf = {name: f"{name}.list.element" for name in table.column_names}
    pq.write_table(
        table,
        path,
        version="2.6",
        data_page_version="2.0",
        row_group_size=_ROW_GROUP,
        compression="zstd",
        compression_level=3,
        use_dictionary=[leaf[name] for name in _DICTIONARY if name in leaf],
        column_encoding={leaf[name]: "BYTE_STREAM_SPLIT" for name in _SPLIT if name in leaf},
        write_page_checksum=True,
        write_statistics=False,
    )


def read_row_groups(path: Path, settings_digest: str, unit: int, rows_lost: str) -> Iterable[pa.Table]:
    """Yield the row groups of a shard, its page checksums verified.

    Raises:
        CacheCorruptionError: the file is no Parquet, a page is damaged, or the shard belongs to another cache.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            belongs = (metadata.get(METADATA_SETTINGS), metadata.get(METADATA_UNIT))
            if belongs != (settings_digest.encode(), str(unit).encode()):
                raise CacheCorruptionError(f"{path} belongs to unit {belongs[1]!r} of another capture; {rows_lost}.")
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, CacheCorruptionError):
            raise
        raise CacheCorruptionError(f"{path} cannot be read ({error}); {rows_lost}.") from error


def list_values(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return a list column as flat values and the length of each list."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    values = array.flatten().to_numpy(zero_copy_only=False)
    return values, np.diff(array.offsets.to_numpy()).astype(np.int64)


def _lists(arrays: Sequence[NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.zeros(0, value_type.to_pandas_dtype())
    # 32-bit offsets bound a shard at 2^31 targets; from_arrays refuses more.
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, value_type))


def _in_stored_order(targets: Extracted) -> Extracted:
    """Order a position's tokens, but for the likeliest ones, by the upper byte of their log-probability, then by id.

    That costs the column of log-probabilities nothing, whose lower bytes do not compress in any order, and makes the
    ids within a step smaller: 3% of the whole at top-64 of SmolLM2.
    """
    ends = np.cumsum(targets.counts, dtype=np.int64)
    position = np.repeat(np.arange(len(ends), dtype=np.int64), targets.counts)
    rank = np.arange(len(position)) - np.repeat(ends - targets.counts, targets.counts)
    step = (targets.logprobs.view(np.uint16) >> 8).astype(np.int64) + _IN_ORDER  # rises as the value falls below 0
    key = (position << 40) | (np.where(rank < _IN_ORDER, rank, step) << 30) | np.where(rank < _IN_ORDER, 0, targets.ids)
    order = np.argsort(key, kind="stable")
    return replace(targets, ids=targets.ids[order], logprobs=targets.logprobs[order])


def _logprobs_field(targets: Targets) -> pa.Field:
    if isinstance(targets, Sampled) and targets.logprobs == "mean":
        return pa.field("mean_logprob", pa.list_(pa.float32()), nullable=False)
    return pa.field("target_logprobs", pa.list_(pa.float16()), nullable=False)


def _require(array: NDArray[Any] | None) -> NDArray[Any]:
    assert array is not None
    return array


@dataclass(frozen=True)
class Example:
    """A row as it is scored. L tokens.

    Attributes:
        example_id: see :func:`example_id`.
        input_ids: (L,) int32.
        completion_mask: (L,) int8, 1 for tokens that are trained on.
        scored: (N,) int64, positions t whose token t+1 is trained on.
        passed: the columns that pass through, such as ``text`` and ``domain``.
        asked: the same response as the teacher reads it, whose scored positions are these N; None for as it is here.
    """

    example_id: str
    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.int8]
    scored: NDArray[np.int64]
    passed: Mapping[str, str | None]
    asked: Example | None = None

    @property
    def for_teacher(self) -> Example:
        """What a teacher is asked about."""
        return self if self.asked is None else self.asked

    @classmethod
    def of(cls, ids: NDArray[np.int32], prompt_length: int, passed: Mapping[str, str | None]) -> Example:
        """Return the example of a prompt of so many tokens and a completion."""
        mask = np.ones(len(ids), np.int8)
        mask[:prompt_length] = 0
        return cls(example_id(ids), ids, mask, scored_positions(mask), passed)


def example_id(input_ids: Sequence[int] | NDArray[Any]) -> str:
    """Return the name of a token sequence: 32 hexadecimal digits, the same on every machine.

    It is the first half of the SHA-256 of the ids written as 4-byte little-endian integers.
    """
    return hashlib.sha256(np.asarray(input_ids, dtype="<i4").tobytes()).hexdigest()[:32]


def scored_positions(completion_mask: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the positions t, in order, whose token t+1 has a mask of 1."""
    return np.flatnonzero(completion_mask[1:]).astype(np.int64)


@dataclass(frozen=True)
class Extracted:
    """Targets of N positions, flat: those of position n are ``counts[n]`` consecutive entries.

    Attributes:
        counts: (N,) int32.
        ids: int32 token ids; by falling probability for top-k, by rising id for sampled.
        logprobs: float16 nats, rounded to nearest: off by at most 2^-11 of the value (0.004 nats at -8).
        tail_logmass: (N,) float32 log of the probability not listed, -inf when all is.
        draws: uint16 counts of each token, or None.
        mean_logprob: (N,) float32 mean over the draws of their log-probability in nats, or None.
    """

    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    tail_logmass: NDArray[np.float32]
    draws: NDArray[np.uint16] | None
    mean_logprob: NDArray[np.float32] | None = None

    def split(self, positions: Sequence[int]) -> list[Extracted]:
        """Take the targets of N positions apart into those of consecutive examples of so many positions each."""
        ends = np.cumsum(positions)
        entry_ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        parts = []
        for end, count in zip(ends, positions, strict=True):
            at = slice(end - count, end)
            entries = slice(entry_ends[end - count], entry_ends[end])
            parts.append(
                Extracted(
                    self.counts[at],
                    self.ids[entries],
                    self.logprobs[entries],
                    self.tail_logmass[at],
                    None if self.draws is None else self.draws[entries],
                    None if self.mean_logprob is None else self.mean_logprob[at],
                )
            )
        return parts

    @classmethod
    def concatenate(cls, parts: list[Extracted]) -> Extracted:
        """Join parts in order."""
        draws = [part.draws for part in parts if part.draws is not None]
        means = [part.mean_logprob for part in parts if part.mean_logprob is not None]
        return cls(
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.tail_logmass for part in parts]),
            np.concatenate(draws) if draws else None,
            np.concatenate(means) if means else None,
        )
