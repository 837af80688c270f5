"""What a capture would cost, before it is begun."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.cache.capture import batches, prepare, score
from kd_plugin.cache.examples import Example
from kd_plugin.cache.schema import CapturedRow, to_table, write_shard
from kd_plugin.cache.targets import Targets
from kd_plugin.errors import DataError
from kd_plugin.teachers import LocalTeacher

_PROBE_ROWS = 1024
_PROBE_BATCHES = 2  # the first warms up, the second is timed


@dataclass(frozen=True)
class Estimate:
    """What a capture would hold and take on this machine, in one process.

    Attributes:
        rows: examples that would be stored.
        dropped: rows without a token to score.
        input_tokens: tokens of the forward passes, without padding.
        targets: scored positions.
        bytes: of the shards, from the size of a shard of the probed rows.
        hours: from the time of one batch.
    """

    rows: int
    dropped: int
    input_tokens: int
    targets: int
    bytes: int
    hours: float


def estimate(dataset: Any, teacher: LocalTeacher, *, targets: Targets, batch_tokens: int, **options: Any) -> Estimate:
    """Count ``dataset`` whole, score two batches of it, and extrapolate; nothing is stored.

    Args:
        dataset: as for :func:`~kd_plugin.cache.capture.capture`.
        teacher: likewise.
        targets: likewise.
        batch_tokens: likewise.
        **options: likewise.

    Raises:
        LicenseRefusedError, ConfigError, VocabularyError, DataError: as ``capture``.
    """
    prepared = prepare(dataset, teacher, targets=targets, batch_tokens=batch_tokens, **options)
    teacher.model  # noqa: B018  the load is no part of the time
    input_tokens = scored = dropped = 0
    lengths: list[int] = []
    probe: list[Example] = []
    for i in range(len(prepared.rows)):
        example = prepared.tokenization(prepared.rows[i], f"row {i}")
        if example is None:
            dropped += 1
            continue
        input_tokens += len(example.input_ids)
        scored += len(example.scored)
        lengths.append(len(example.input_ids))
        if len(probe) < _PROBE_ROWS:
            probe.append(example)
    if not probe:
        raise DataError(f"None of the {len(prepared.rows)} rows has a token to score: all were cut or masked away.")
    # Batches of middling length stand for the others.
    grouped = batches([len(e.input_ids) for e in probe], batch_tokens)
    chosen = [probe[i] for i in grouped[len(grouped) // 2]]
    for _ in range(_PROBE_BATCHES):
        started = time.perf_counter()
        results = score(chosen, teacher, prepared.settings)
        seconds = time.perf_counter() - started
    captured = [CapturedRow(e, t) for e, t in zip(chosen, results, strict=True)]
    table = to_table(captured, prepared.settings.passed, targets)
    with tempfile.TemporaryDirectory() as directory:
        shard = Path(directory) / "probe.parquet"
        write_shard(shard, table, prepared.settings.digest, 0)
        size = shard.stat().st_size
    share = sum(len(e.scored) for e in chosen) / scored
    probed = sum(len(e.input_ids) for e in chosen)
    return Estimate(
        rows=len(lengths),
        dropped=dropped,
        input_tokens=input_tokens,
        targets=scored,
        bytes=round(size / share),
        hours=seconds * input_tokens / probed / 3600,
    )
