"""What a capture would cost, before it is begun."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.cache.manifest import Settings
from kd_plugin.cache.schema import CapturedRow, Example, to_table, write_shard
from kd_plugin.capturing.capture import CaptureSettings, PreparedCapture, prepare
from kd_plugin.capturing.engines import Engine, open_engine
from kd_plugin.capturing.work import Progress, RowBatch, examples_of, generated_rows
from kd_plugin.errors import DataError
from kd_plugin.settings import built, takes

_PROBE_ROWS = 1024
_PROBE_BATCHES = 2  # the first warms up, the second is timed
_READ_ROWS = 1000


@dataclass(frozen=True)
class CaptureEstimate:
    """What a capture would hold and take on this machine, in one process.

    Where the teacher generates, all but ``dataset_rows`` is extrapolated from one batch of completions.

    Attributes:
        dataset_rows: rows of the dataset.
        rows: examples that would be stored.
        dropped: rows or completions that would not, by reason.
        input_tokens: tokens of the forward passes, without padding.
        targets: scored positions.
        bytes: of the shards, from the size of a shard of the probed rows.
        hours: from the time of one batch.
    """

    dataset_rows: int
    rows: int
    dropped: dict[str, int]
    input_tokens: int
    targets: int
    bytes: int
    hours: float


@takes(CaptureSettings)
def estimate(  # noqa: D417
    dataset: Any, teacher: Any, *, tokenizer: Any = None, **fields: Any
) -> CaptureEstimate:
    """Count ``dataset`` whole, score two batches of it or let one be generated, and extrapolate; nothing is stored.

    Args:
        dataset: as for :func:`~kd_plugin.capturing.capture.capture`.
        teacher: likewise.
        tokenizer: likewise.

    Raises:
        LicenseRefusedError, ConfigError, VocabularyError, DataError, ServerError: as ``capture``.
    """
    asked = built(CaptureSettings, fields)
    prepared = prepare(dataset, teacher, asked, tokenizer)
    engine = open_engine(prepared.teacher, prepared.settings, asked.batch_tokens, prepared.writer)
    if prepared.settings.generation is not None:
        return _written(prepared, engine)
    input_tokens = scored = rows = 0
    dropped: Counter[str] = Counter()
    probe: list[Example] = []
    for example in _examples(prepared, dropped):
        rows += 1
        input_tokens += len(example.input_ids)
        scored += len(example.scored)
        if len(probe) < _PROBE_ROWS:
            probe.append(example)
    if not probe:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise DataError(f"Nothing of the {len(prepared.job.rows)} rows would be stored: {reasons}.")
    # Batches of middling length stand for the others.
    grouped = engine.batches([len(e.for_teacher.input_ids) for e in probe])
    chosen = [probe[i] for i in grouped[len(grouped) // 2]]
    for _ in range(_PROBE_BATCHES):
        started = time.perf_counter()
        results = engine.score([e.for_teacher for e in chosen], prepared.settings)
        seconds = time.perf_counter() - started
    kept = [prepared.job.tokenization.kept(targets) for targets in results]
    captured = [CapturedRow(e, t) for e, t in zip(chosen, kept, strict=True)]
    share = sum(len(e.scored) for e in chosen) / scored
    probed = sum(len(e.input_ids) for e in chosen)
    return CaptureEstimate(
        dataset_rows=len(prepared.job.rows),
        rows=rows,
        dropped=dict(dropped),
        input_tokens=input_tokens,
        targets=scored,
        bytes=round(_bytes(captured, prepared.settings) / share),
        hours=seconds * input_tokens / probed / 3600,
    )


def _examples(prepared: PreparedCapture, dropped: Counter[str]) -> Iterator[Example]:
    job = prepared.job
    for first in range(0, len(job.rows), _READ_ROWS):
        yield from examples_of(job.rows.slice(first, min(_READ_ROWS, len(job.rows) - first)), first, job, dropped)


def _written(prepared: PreparedCapture, engine: Engine) -> CaptureEstimate:
    """Let one batch be written and scored."""
    job, settings = prepared.job, prepared.settings
    assert settings.generation is not None
    rows = job.rows.slice(0, min(len(job.rows), _PROBE_ROWS))
    most = settings.generation.max_new_tokens
    lengths = [len(job.tokenization.prompt(row, f"row {i}")) + most for i, row in enumerate(rows)]
    many = max(1, len(engine.batches(lengths)[0]) // settings.generation.n)
    started = time.perf_counter()
    with Progress(many, 0, False, "dry run") as bar:
        probe = RowBatch(rows[:many], 0, job, engine, settings, bar)
        captured = generated_rows(probe)
    seconds = time.perf_counter() - started
    scale = len(job.rows) / many
    return CaptureEstimate(
        dataset_rows=len(job.rows),
        rows=round(len(captured) * scale),
        dropped={reason: round(count * scale) for reason, count in probe.dropped.items()},
        input_tokens=round(sum(len(row.example.input_ids) for row in captured) * scale),
        targets=round(sum(len(row.example.scored) for row in captured) * scale),
        bytes=round(_bytes(captured, settings) * scale) if captured else 0,
        hours=seconds * scale / 3600,
    )


def _bytes(captured: Sequence[CapturedRow], settings: Settings) -> int:
    with tempfile.TemporaryDirectory() as directory:
        shard = Path(directory) / "probe.parquet"
        write_shard(shard, to_table(captured, settings.passed, settings.targets), settings.digest, 0)
        return shard.stat().st_size
