"""Reading the mapped form of a cache: targets by number, rows by their tokens.

All processes of a machine share the files through the page cache, and opening costs nothing that grows with
them. Every 256 KiB block of the target files has a CRC-32 that is checked when this process first touches the
block: a flipped byte is an error at its first read. Rows and index are checked whole when first used.

Why no memory-mapped Arrow: a batch asks for targets by number, in any order (rows are packed, cut and padded), which
one ``index_select`` answers at 8.5 million targets a second; Arrow's ``take`` gives 0.07, and a slice for each example,
where whole examples are asked for, 5.5. And no part of an Arrow file has a checksum. Top-64 in files that are in
memory, one thread: ``python -m tests.benchmarks.teacher_cache arrow --examples 2000 --length 128``.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.files import fitting, unseal
from kd_plugin.cache.manifest import Manifest, Settings
from kd_plugin.cache.mapped_write import BLOCK_BYTES, MAPPED_VERSION, FlatFile, bucket_bits
from kd_plugin.cache.targets import Sampled
from kd_plugin.errors import CacheCorruptionError, DataError
from kd_plugin.lineage.hashing import sha256_file
from kd_plugin.signals import SparseSignal

_TORCH = {"<i4": torch.int32, "<f2": torch.float16, "<f4": torch.float32, "<i8": torch.int64, "<i2": torch.int16}
_DTYPES = {
    "ids.bin": "<i4", "tail.bin": "<f4", "draws.bin": "<i2", "mean_logprob.bin": "<f4", "logprobs.bin": "<f2",
    "offsets.bin": "<i8", "index_keys.bin": "<u8", "index_rows.bin": "<i8", "index_buckets.bin": "<i8",
}  # fmt: skip


def _names_of(settings: Settings) -> set[str]:
    """Return the files of a mapped form, as :func:`~kd_plugin.cache.mapped_write.build` writes them."""
    names = {"ids.bin", "tail.bin", "index_keys.bin", "index_rows.bin", "index_buckets.bin"}
    targets = settings.targets
    means = isinstance(targets, Sampled) and targets.logprobs == "mean"
    names |= {"mean_logprob.bin" if means else "logprobs.bin"}
    names |= {"draws.bin"} if isinstance(targets, Sampled) else set()
    return names if settings.lists_equally_many else names | {"offsets.bin"}


class CheckedFile:
    """A memory-mapped flat file whose blocks are verified when they are first touched.

    Args:
        directory: the mapped directory.
        file: its record.
        way_out: what messages advise.

    Raises:
        CacheCorruptionError: the file or its checksums are missing, of another size, or damaged.
    """

    def __init__(self, directory: Path, file: FlatFile, way_out: str) -> None:
        self.path = directory / file.name
        self._way_out = way_out
        self._item_bytes = np.dtype(file.dtype).itemsize
        checks_path = self.path.with_name(file.name + ".crc")
        expected = file.items * self._item_bytes
        if not self.path.is_file() or self.path.stat().st_size != expected:
            raise CacheCorruptionError(f"{self.path} is missing or has not its {expected} bytes. {way_out}")
        checks = checks_path.read_bytes() if checks_path.is_file() else b""
        if hashlib.sha256(checks).hexdigest() != file.checks_sha256:
            raise CacheCorruptionError(f"{checks_path} was changed: its digest does not match. {way_out}")
        self._checks = np.frombuffer(checks, "<u4")
        self._unread = np.ones(len(self._checks), bool)
        self._any_unread = len(self._checks) > 0
        # shared=False maps copy-on-write: nothing that is done to the tensor can reach the file.
        self.tensor = torch.from_file(str(self.path), shared=False, size=file.items, dtype=_TORCH[file.dtype])

    def verify(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Check the blocks that hold the items ``first`` to ``last``, (N,) each, both ends included.

        Raises:
            CacheCorruptionError: a block differs from what was written.
        """
        if not self._any_unread or not len(first):
            return
        low, high = first * self._item_bytes // BLOCK_BYTES, last * self._item_bytes // BLOCK_BYTES
        spans = low[:, None] + np.arange(int((high - low).max()) + 1)
        blocks = np.unique(np.minimum(spans, high[:, None]))
        blocks = blocks[self._unread[blocks]]
        data = self.tensor.numpy().view(np.uint8).data
        for block in blocks:
            if zlib.crc32(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != self._checks[block]:
                raise CacheCorruptionError(
                    f"{self.path} was changed in the {BLOCK_BYTES} bytes from {block * BLOCK_BYTES}. {self._way_out}"
                )
        self._unread[blocks] = False
        if len(blocks):
            self._any_unread = bool(self._unread.any())


@dataclass(frozen=True)
class _Targets:
    ids: CheckedFile
    tail: CheckedFile
    logprobs: CheckedFile | None
    offsets: CheckedFile | None
    draws: CheckedFile | None
    mean_logprob: CheckedFile | None


class Mapped:
    """The mapped form, opened.

    Args:
        directory: where :func:`~kd_plugin.cache.mapped_write.build` put it.
        manifest: of the cache that it was built from.

    Raises:
        CacheCorruptionError: it is damaged; it can be deleted and is then built again from the shards.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self._way_out = f"Nothing is lost: delete {directory} and it is built again from the shards."
        record = unseal(directory / "mapped.json", self._way_out)
        if record.get("version") != MAPPED_VERSION or record.get("content") != manifest.content_digest:
            raise CacheCorruptionError(f"{directory} was built from other shards. {self._way_out}")
        self._rows_sha256 = str(record.get("rows_sha256"))
        files = self._files_of(record, manifest.settings)
        opened = {
            name: CheckedFile(directory, file, self._way_out) for name, file in files.items() if "index" not in name
        }
        self._files = files
        self._targets = _Targets(
            opened["ids.bin"],
            opened["tail.bin"],
            opened.get("logprobs.bin"),
            opened.get("offsets.bin"),
            opened.get("draws.bin"),
            opened.get("mean_logprob.bin"),
        )
        self.tokens = files["tail.bin"].items
        # Top-k lists equally many everywhere, so a target is found without offsets.
        self._width = files["ids.bin"].items // max(self.tokens, 1)

    def _files_of(self, record: Mapping[str, Any], settings: Settings) -> dict[str, FlatFile]:
        """Read the list of files: all that these targets need, and none but those, each of its own type."""
        listed = record.get("files")
        where = f"a file of {self.directory / 'mapped.json'}"
        found = [FlatFile(**fitting(FlatFile, one, where)) for one in (listed if isinstance(listed, list) else [])]
        files = {one.name: one for one in found if _DTYPES.get(one.name) == one.dtype}
        if len(files) != len(found) or files.keys() != _names_of(settings):
            raise CacheCorruptionError(f"{self.directory} does not list its files as they were built. {self._way_out}")
        return files

    def signal(self, index: Tensor) -> SparseSignal:
        """Gather the targets of number ``index`` (N,); see :meth:`TeacherCache.signal`."""
        numbers = self._checked_numbers(index)
        targets = self._targets
        self._targets.tail.verify(numbers, numbers)
        tail = targets.tail.tensor.index_select(0, index)
        if targets.offsets is None:
            assert targets.logprobs is not None
            width = self._width
            for file in (targets.ids, targets.logprobs):
                file.verify(numbers * width, numbers * width + width - 1)
            ids = targets.ids.tensor.view(-1, width).index_select(0, index)
            logprobs = targets.logprobs.tensor.view(-1, width).index_select(0, index)
            return SparseSignal(ids.long(), logprobs.float(), tail)
        targets.offsets.verify(numbers, numbers + 1)
        start, end = targets.offsets.tensor[index], targets.offsets.tensor[index + 1]
        width = int((end - start).max()) if len(index) else 0
        at = start[:, None] + torch.arange(width)
        listed = at < end[:, None]
        at = torch.where(listed, at, start[:, None])
        flat = at.reshape(-1)

        def gather(file: CheckedFile) -> Tensor:
            file.verify(start.numpy(), end.numpy() - 1)
            return file.tensor.index_select(0, flat).view_as(at)

        ids = gather(targets.ids).long().masked_fill_(~listed, 0)
        draws = None if targets.draws is None else gather(targets.draws).long().masked_fill_(~listed, 0)
        if targets.logprobs is not None:
            return SparseSignal(ids, gather(targets.logprobs).float().masked_fill_(~listed, -torch.inf), tail, draws)
        assert draws is not None and targets.mean_logprob is not None
        targets.mean_logprob.verify(numbers, numbers)
        mean = targets.mean_logprob.tensor.index_select(0, index)
        return SparseSignal(ids, _logprobs_of_draws(draws, mean), tail, draws)

    def teacher_indices(self, key: bytes) -> list[list[int]]:
        """Return the per-token column of each example whose 16-byte id is ``key``, in the order of the rows."""
        return [self._rows["teacher_index"][row].as_py() for row in self._find(key)]

    def rows_path(self) -> Path:
        """Return the path of ``rows.arrow``, verified.

        Raises:
            CacheCorruptionError: it differs from what was written.
        """
        path = self.directory / "rows" / "rows.arrow"
        self._verify_whole(path, self._rows_sha256)
        return path

    def verify(self) -> None:
        """Check every byte of every file.

        Raises:
            CacheCorruptionError: a file is damaged.
        """
        for name, file in self._files.items():
            self._verify_whole(self.directory / name, file.sha256)
        self.rows_path()

    @cached_property
    def _rows(self) -> pa.Table:
        return pa.ipc.open_stream(pa.memory_map(str(self.rows_path()))).read_all()

    @cached_property
    def _index(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        arrays = []
        for name in ("index_keys.bin", "index_rows.bin", "index_buckets.bin"):
            file = self._files[name]
            self._verify_whole(self.directory / name, file.sha256)
            arrays.append(np.memmap(self.directory / name, file.dtype, "r") if file.items else np.zeros(0, file.dtype))
        return arrays[0].reshape(-1, 2), arrays[1], arrays[2]

    def _find(self, key: bytes) -> list[int]:
        keys, rows, buckets = self._index
        high, low = (int.from_bytes(part, "big") for part in (key[:8], key[8:]))
        bits = bucket_bits(len(keys))
        bucket = high >> (64 - bits) if bits else 0
        entries = range(int(buckets[bucket]), int(buckets[bucket + 1]))
        return [int(rows[e]) for e in entries if int(keys[e, 0]) == high and int(keys[e, 1]) == low]

    def _checked_numbers(self, index: Tensor) -> NDArray[np.int64]:
        if index.dtype != torch.int64 or index.dim() != 1 or index.device.type != "cpu":
            raise DataError(
                f"teacher_index must be a 1-dimensional int64 tensor on the CPU, got {index.dtype} of shape "
                f"{tuple(index.shape)} on {index.device}."
            )
        numbers = index.detach().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.tokens:
            raise DataError(
                f"teacher_index goes from {numbers.min()} to {numbers.max()}; this cache has the targets 0 to "
                f"{self.tokens - 1}. Leave out positions without a target (-1), and join with the cache that the "
                "dataset was made from."
            )
        return numbers

    def _verify_whole(self, path: Path, sha256: str) -> None:
        if not path.is_file() or sha256_file(path) != sha256:
            raise CacheCorruptionError(f"{path} is missing or was changed: its digest does not match. {self._way_out}")


def _logprobs_of_draws(draws: Tensor, mean: Tensor) -> Tensor:
    """Estimate log-probabilities (N, K) by the draws' frequencies, shifted so that their mean over the draws is right.

    The forward KL takes only that mean, so it is what it would be with each token's own log-probability.

    Args:
        draws: (N, K) counts; 0 for padding, which becomes -inf.
        mean: (N,) mean log-probability of the draws, in nats.
    """
    logs = draws.float().log()
    weight = draws / draws.sum(-1, keepdim=True).clamp(min=1)
    shift = mean - (weight * logs.clamp(min=0.0)).sum(-1)
    return logs + shift[:, None]
