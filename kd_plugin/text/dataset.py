"""The dataset that a capture of text ends in: Parquet files, a card, and the record of who wrote it.

``datasets.load_dataset(DIR)`` reads it like any other. The record is placed last, so that its presence means that the
rest is whole; it names the digest of each file, and speaks for those bytes alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_plugin.cache.files import explained, publish, remove_leftovers, temporary_name
from kd_plugin.capturing.tokenization import Tokenization
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import CacheError, ConfigError, DataError
from kd_plugin.inputs import load_rows
from kd_plugin.lineage.data import CACHE, TEXT_RECORD, TEXT_SCHEMA, read_text_record, with_origin
from kd_plugin.lineage.hashing import sha256_file
from kd_plugin.lineage.record import canonical, digest_of
from kd_plugin.lineage.sources import Source
from kd_plugin.text.selecting import Selection
from kd_plugin.text.spending import Budget, Spent

CONTAMINATED_LIST = "contaminated.jsonl"
_SHARD_ROWS = 100_000
_WAY_OUT = "The answers are kept: make room, and run the same command again."


def publish_dataset(
    directory: Path,
    tables: Iterable[pa.Table],
    *,
    lineage: Mapping[str, Any],
    sampling: Mapping[str, Any],
    selection: Selection,
    budget: Budget,
    complete: bool,
) -> None:
    """Write the dataset, in the place of one that was selected before from the same answers.

    Args:
        directory: of the capture.
        tables: the rows.
        lineage: nodes and edges of who wrote and what they were shown.
        sampling: how texts were sampled.
        selection: what was dropped, and which items of evaluation sets were found.
        budget: what was spent.
        complete: whether every prompt was asked.

    Raises:
        CacheError: the directory cannot be written.
    """
    with explained(f"Writing the dataset in {directory}", _WAY_OUT):
        remove_leftovers(directory)
        (directory / TEXT_RECORD).unlink(missing_ok=True)
        names = _write_shards(directory, tables)
        for path in directory.glob("train-*.parquet"):
            if path.name not in names:
                path.unlink()
        listed = [json.dumps({"row": row, **asdict(found)}) + "\n" for row, found in selection.found]
        _place(directory / CONTAMINATED_LIST, "".join(listed).encode())
        seal_dataset(
            directory,
            names,
            lineage=lineage,
            outputs={"rows": selection.kept, "sampling": dict(sampling)},
            budget=budget,
            dropped=selection.dropped,
            contaminated=len(selection.found),
            complete=complete,
        )


def seal_dataset(
    directory: Path,
    names: Iterable[str],
    *,
    lineage: Mapping[str, Any],
    outputs: Mapping[str, Any],
    budget: Budget | Spent,
    dropped: Mapping[str, int],
    **facts: Any,
) -> None:
    """Place the card and, last, the record of who wrote the files of a dataset of text.

    Args:
        directory: of the dataset.
        names: its Parquet files.
        lineage: nodes and edges of who wrote and what they were shown.
        outputs: its ``rows``, and how they came to be.
        budget: what was spent.
        dropped: reason to the number of texts that are not in it.
        **facts: further plain values of the record.
    """
    files = {
        name: {"sha256": sha256_file(directory / name), "size": (directory / name).stat().st_size} for name in names
    }
    tokens = {name: asdict(usage) for name, usage in sorted(budget.usage.items())}
    record: dict[str, Any] = {
        "schema": TEXT_SCHEMA,
        "lineage": dict(lineage),
        "outputs": {"tokens": tokens, "date": datetime.now(UTC).date().isoformat(), **outputs},
        "files": files,
        "dropped": dict(sorted(dropped.items())),
        "spent": budget.spent,
        **facts,
    }
    _place(directory / "README.md", _card(record).encode())
    _place(directory / TEXT_RECORD, canonical({**record, "digest": digest_of(record)}))


def text_source(directory: str | Path) -> Source:
    """Return a dataset of text as the teacher's outputs that it is, with its lineage.

    Raises:
        CacheError: there is no finished dataset of this kind, or its files are not those that its record names.
    """
    path = Path(directory)
    record, problem = read_text_record(path)
    if record is None:
        raise CacheError(
            f"{path} holds no dataset of a teacher's text: {problem or f'it has no {TEXT_RECORD}'}. Capture it with "
            "`kd-plugin capture` and targets: text; run that again where it was interrupted."
        )
    return Source(name=path.name, kind="teacher_outputs", ref=str(path), signal="text", record=record)


def load_text(directory: str | Path) -> Any:
    """Return the rows of a dataset of text, memory-mapped; raises CacheError as :func:`text_source`."""
    text_source(directory)
    return load_rows(str(directory))


@dataclass(frozen=True)
class TrainingText:
    """A teacher's text as a run trains on it.

    Attributes:
        source: the text as an ancestor of what is trained on it.
        path: its directory.
    """

    source: Source
    path: Path

    @classmethod
    def open(cls, directory: str | Path, offline: OfflineSettings, cache: Any = None) -> TrainingText:
        """Open what a user names as ``teacher_text``.

        Args:
            directory: of a capture of text.
            offline: how the run distils; text has no distribution, so what only a distribution has is refused.
            cache: what is named as ``teacher_cache``; a run has one or the other.

        Raises:
            ConfigError: both are named, or a setting asks for a divergence.
            CacheError: see :func:`text_source`.
        """
        if cache is not None:
            raise ConfigError("teacher_cache and teacher_text are both given; a run is fitted to one of them.")
        defaults, weights = OfflineSettings(), (offline.kd_weight, offline.ce_weight)
        asked = [f.name for f in fields(offline) if getattr(offline, f.name) != getattr(defaults, f.name)]
        others = [name for name in asked if name not in ("kd_weight", "ce_weight")]
        if others or weights not in ((1.0, 0.0), (0.0, 1.0)):
            name = others[0] if others else "kd_weight" if offline.kd_weight not in (0.0, 1.0) else "ce_weight"
            raise ConfigError(
                f"{name}={getattr(offline, name)!r} asks for a divergence, and teacher_text is text, which has no "
                "distribution: the loss is the cross-entropy of what the teacher wrote (kd_weight: 0, ce_weight: 1). "
                "Leave it out, or capture a teacher cache."
            )
        return cls(text_source(directory), Path(directory))

    @property
    def rows(self) -> Any:
        """The rows with ``prompt`` and ``completion``, of which the run's own lineage speaks."""
        rows = load_rows(str(self.path)).select_columns(["prompt", "completion"])
        rows.info.download_checksums = None
        record: Any = self.source.record
        return with_origin(rows, f"{CACHE}{record['outputs']['digest']}")

    def tokenized(self, tokenizer: Any, vocab_size: int, max_length: int | None = None) -> Any:
        """Return the rows as ``input_ids`` and ``labels``, -100 in the prompt, as TRL prepares them.

        Args:
            tokenizer: the student's, any.
            vocab_size: ids at or above it are refused.
            max_length: tokens kept from the start of a row; rows of which nothing is left are dropped.

        Raises:
            DataError: nothing is left of any row.
        """
        rows = self.rows
        encode = _Encode(Tokenization(tokenizer, vocab_size, max_length, completion_only=True))
        tokens = rows.map(encode, remove_columns=rows.column_names)
        kept = tokens.filter(lambda labels: any(label != -100 for label in labels), input_columns="labels")
        if not len(kept):
            raise DataError(f"Nothing is left of {self.path}: max_length={max_length} cuts off every completion.")
        return kept


@dataclass(frozen=True)
class _Encode:
    tokenization: Tokenization

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        example = self.tokenization(row)
        if example is None:
            return {"input_ids": [], "labels": []}
        ids, mask = example.input_ids.tolist(), example.completion_mask.tolist()
        return {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}


def _write_shards(directory: Path, tables: Iterable[pa.Table]) -> list[str]:
    names: list[str] = []
    writer: pq.ParquetWriter | None = None
    made, rows = Path(), 0

    def close() -> None:
        nonlocal writer
        if writer is not None:
            writer.close()
            names.append(f"train-{len(names):05d}.parquet")
            publish(made, directory / names[-1])
            writer = None

    for table in tables:
        if not table.num_rows:
            continue
        if writer is None:
            made, rows = temporary_name(directory, "train"), 0
            writer = pq.ParquetWriter(made, table.schema, compression="zstd")
        writer.write_table(table)
        rows += table.num_rows
        if rows >= _SHARD_ROWS:
            close()
    close()
    return names


def _place(path: Path, data: bytes) -> None:
    made = temporary_name(path.parent, path.name)
    made.write_bytes(data)
    publish(made, path)


def _card(record: Mapping[str, Any]) -> str:
    """Return a card that hub and ``datasets`` read; what counts as lineage is the record beside it."""
    teachers = sorted({str(n["name"]) for n in record["lineage"]["nodes"] if n.get("kind") == "model"})
    dropped = "".join(f"| {reason} | {count} |\n" for reason, count in record["dropped"].items())
    return (
        # No `configs`, with which datasets (5.0) takes what it cached of another directory of this name
        f"---\ntags:\n- distillation\n- synthetic\ndistillation:\n  lineage: {TEXT_RECORD}\n---\n"
        f"# Text of teachers\n\n{record['outputs']['rows']} rows in TRL's form of prompt and completion, written by "
        f"{', '.join(teachers)} on or before {record['outputs']['date']}. Captured with kd-plugin; who wrote it, under "
        f"which terms, and the digests of the files are in `{TEXT_RECORD}`.\n\n"
        + (f"| dropped because | answers |\n|---|---|\n{dropped}" if dropped else "")
    )
