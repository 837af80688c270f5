"""The index from tokens to rows is sorted on the disk; whatever the number of rows, each is found."""

import hashlib

import numpy as np
import pytest

from kd_plugin.cache import mapped_write as module
from kd_plugin.cache.mapped_write import IndexWriter, bucket_bits


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 700])
def test_keys_are_sorted_and_buckets_begin_where_they_should(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    ids = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()[:32] for i in range(rows)]
    ids[100:200] = ids[300:400]  # the same tokens twice: the first row comes first
    writer = IndexWriter(tmp_path)
    for first in range(0, rows, 50):
        writer.append(ids[first : first + 50])
    keys, numbers, buckets = (np.fromfile(tmp_path / file.name, file.dtype) for file in writer.finish())
    expected = sorted((key, row) for row, key in enumerate(ids))
    found = [f"{high:016x}{low:016x}" for high, low in keys.reshape(-1, 2)]
    assert list(zip(found, numbers, strict=True)) == expected
    bits = bucket_bits(rows)
    leading = np.array([int(key, 16) >> (128 - bits) for key, _ in expected], dtype=np.int64)
    assert buckets.tolist() == [int((leading < bucket).sum()) for bucket in range(2**bits)] + [rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"index_{n}.bin" for n in ("keys", "rows", "buckets")
    )
