"""A trainer's rows with the targets of a cache: labelled, looked up, surveyed and cut.

Whole columns are worked on where they can be: a row at a time takes minutes for a million rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from kd_plugin.cache.joining import kept_tokens, require_complete, survey
from kd_plugin.cache.joint import JointCache
from kd_plugin.cache.templates import fingerprint, is_conversation, prints_time
from kd_plugin.errors import DataError
from kd_plugin.vocab import SharedTokens, Vocabulary

logger = logging.getLogger(__name__)
_COMPARED, _SHOWN_TOKENS = 256, 4  # rows of a cache that a missing row is compared with, and tokens that are shown


@dataclass(frozen=True)
class Window:
    """Which tokens of a row are left when training has cut it.

    Attributes:
        max_length: tokens that are kept; None for all.
        keep_end: whether they are the last ones.
    """

    max_length: int | None = None
    keep_end: bool = False


@dataclass(frozen=True)
class Joining:
    """How rows are joined to a cache.

    Attributes:
        cache: the cache.
        vocabulary: of the run; rows with a token that an output head of the run has no row for are refused.
        allow_partial: whether tokens and rows that the cache does not hold are allowed.
        keep_untaught: whether such rows are trained on, for their cross-entropy.
    """

    cache: JointCache
    vocabulary: Vocabulary
    allow_partial: bool = False
    keep_untaught: bool = False

    def __call__(self, dataset: Any, name: str, window: Window = Window(), why: str = "") -> Any:
        """Add the columns ``teacher_index`` to each row, unless the rows come from these caches and have them.

        Args:
            dataset: a ``datasets.Dataset`` or a stream, of whole rows with ``input_ids``; what has no ``labels`` yet
                is looked at batch by batch.
            name: of the dataset.
            window: what training will leave of each row.
            why: what is known of the cause where rows are not in the cache; a sentence, or nothing.

        Raises:
            DataError: a token that is trained on has no target, rows come from another cache, or cannot be joined.
        """
        cache, columns = self.cache, self.cache.columns
        present = columns_of(dataset)
        if not set(columns) <= set(present):
            if "input_ids" not in present or not hasattr(dataset, "map"):
                raise DataError(
                    f"The {name} dataset is a {type(dataset).__name__} with {', '.join(map(repr, present))}, which "
                    "cannot be joined to a teacher cache. Give a datasets.Dataset of tokenized rows with 'input_ids' "
                    "and 'labels', or leave it out to train on the cache's own rows."
                )
            streamed = not isinstance(dataset, Dataset)
            dataset = dataset.map(_Join(cache, window, self.allow_partial or not streamed, why))
        elif "example_id" in present:
            cache.require_own(dataset, name)
            if cache.shared is not None:
                require_shared(dataset, cache.shared, name)
        if isinstance(dataset, Dataset) and "labels" in present:
            dataset = self._surveyed(dataset, name, window, why)
        return readable_rows(dataset, self.vocabulary, name) if self.vocabulary.is_cut else dataset

    def _surveyed(self, dataset: Dataset, name: str, window: Window, why: str) -> Dataset:
        found = survey(dataset, self.cache, window.max_length, window.keep_end)
        if not self.allow_partial:
            if len(found.absent) and "input_ids" in dataset.column_names:
                row = dataset[int(found.absent[0])]["input_ids"]
                why = " ".join(filter(None, (why, first_difference(self.cache, row))))
            require_complete(found, self.cache, name, why)
        elif found.missing:
            logger.warning(
                f"{found.missing} of {found.tokens} trained tokens of the {name} dataset have no target, among "
                f"them those of {len(found.absent)} of {found.rows} rows that are not in the cache."
            )
            if not self.keep_untaught:
                return dataset.select(found.taught)
        return dataset


def columns_of(dataset: Any) -> list[str]:
    """Return the columns of a dataset; those of its first row where it does not say."""
    return getattr(dataset, "column_names", None) or list(next(iter(dataset), ()))


@dataclass(frozen=True)
class _Join:
    """Looks a tokenized row up in the caches by the hash of its token ids."""

    cache: JointCache
    window: Window
    allow_missing: bool
    why: str

    def __call__(self, example: dict[str, Any]) -> dict[str, list[int]]:
        indices = self.cache.indices(example["input_ids"])
        if not self.allow_missing and all(i < 0 for column in indices.values() for i in column):
            labels = np.asarray(example.get("labels", example["input_ids"]))
            kept = kept_tokens(np.array([len(labels)]), self.window.max_length, self.window.keep_end)
            if (labels[kept] != -100).any():
                raise self.cache.missing(example["input_ids"], self.why)
        return indices


@dataclass(frozen=True)
class CutIndex:
    """Cuts the columns ``teacher_index`` of a row to what truncation left of its tokens.

    Attributes:
        columns: of the cache.
        keep_end: whether the last tokens were kept.
    """

    columns: list[str]
    keep_end: bool

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of a row, as long as its tokens."""
        length = len(example["input_ids"])
        cut = slice(-length, None) if self.keep_end else slice(length)
        return {column: example[column][cut] for column in self.columns}


def why_not_found(cache: JointCache, processing_class: Any, training_template: str | None, dataset: Any) -> str:
    """Say why conversations may have other tokens than at capture; empty where nothing is known.

    Args:
        cache: that holds none of them.
        processing_class: the tokenizer.
        training_template: what TRL renders with in the place of the tokenizer's own template, or None.
        dataset: the rows as the user gave them.
    """
    if not is_conversation(next(iter(dataset))):
        return ""
    own = processing_class.chat_template
    used = fingerprint(training_template or (own if isinstance(own, str) else None))
    for member in cache.members:
        settings = member.cache.manifest.settings
        if used != (settings.rendered_with or settings.chat_template):
            if training_template is not None:
                return (
                    "With assistant_only_loss=True TRL renders conversations by its training template, and the capture "
                    "rendered them by another: capture with assistant_only=True."
                )
            if settings.rendered_with is not None:
                return (
                    "The capture rendered conversations by a template in the place of the tokenizer's own: set the "
                    "tokenizer's chat_template to it, or assistant_only_loss=True where it is TRL's training template."
                )
            return "The capture rendered conversations by another chat template than training does."
        if settings.rendered_at is None and prints_time(processing_class):
            return (
                "The chat template prints today's date, and the cache does not say which date it printed: it was begun "
                f"on {member.cache.manifest.created[:10]} by an earlier kd-plugin. Capture again."
            )
    return ""


def something_to_cut(dataset: Any, max_length: int, name: str) -> bool:
    """Whether ``max_length`` cuts a row, or a row has no label at all; warn of the targets that are cut off."""
    if not isinstance(dataset, Dataset):
        return True
    counted = [
        (pc.list_value_length(batch["input_ids"]).to_numpy(), _rows_with_labels(batch["labels"]))
        for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000)
    ]
    lengths, labelled = np.concatenate([found for found, _ in counted]), sum(count for _, count in counted)
    longer = int((lengths > max_length).sum())
    if longer:
        logger.warning(
            f"{longer} of {len(lengths)} rows of the {name} dataset are longer than max_length={max_length}: "
            f"{int((lengths - max_length).clip(min=0).sum())} tokens are cut off, and their targets are not used. The "
            f"longest row has {int(lengths.max())} tokens; max_length=None cuts nothing."
        )
    return longer > 0 or labelled < len(lengths)


def _rows_with_labels(labels: pa.ChunkedArray) -> int:
    rows = pc.list_parent_indices(labels).to_numpy()
    return len(np.unique(rows[pc.list_flatten(labels).to_numpy() != -100]))


def with_labels(dataset: Any, columns: list[str], completion_only: bool, name: str) -> Any:
    """Add the labels of a cache's rows, and leave out the mask that they came from.

    Args:
        dataset: any dataset; one that is streamed, has labels, or was not made by a cache is returned as it is.
        columns: what marks the rows of a cache.
        completion_only: whether only tokens of the completion have a label.
        name: what the progress bar calls it.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return dataset
    present = set(dataset.column_names)
    if not {"input_ids", "completion_mask", "example_id", *columns} <= present or present & {
        "labels",
        "assistant_masks",
    }:
        return dataset
    labelled = dataset.with_format("arrow").map(
        _AddLabels("completion_mask" if completion_only else None),
        batched=True,
        desc=f"Building labels for {name} rows",
    )
    return labelled.with_format(None)


def first_difference(cache: JointCache, ids: Sequence[int]) -> str:
    """Say at which token a row parts from the row of the caches that begins most like it; looks at the first 256.

    Args:
        cache: the caches, none of which holds the row.
        ids: of the row.

    Returns:
        A sentence; empty where no cached row begins as this one does, so that nothing is known.
    """
    member = cache.members[0].cache
    rows = member.dataset().select_columns("input_ids")
    best: list[int] = []
    common = 0
    for row in rows.select(range(min(len(rows), _COMPARED))):
        held = row["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(ids, held, strict=False)) if a != b), min(len(ids), len(held)))
        if same > common:
            best, common = held, same
    if not common:
        return ""
    names = {} if member.tokens_kept is None else {index: token for token, index in member.tokens_kept.tokens.items()}

    def shown(tokens: Sequence[int]) -> str:
        listed = [repr(names[i]) if i in names else str(i) for i in tokens[common : common + _SHOWN_TOKENS]]
        return " ".join(listed) or "its end"

    return (
        f"Token by token, that row equals one of the cache up to token {common}; then it has {shown(ids)}, and the "
        f"cache {shown(best)}."
    )


def require_shared(dataset: Any, shared: SharedTokens, name: str) -> None:
    """Refuse a cache's own rows that hold a token which the student has not; of a stream nothing is looked at.

    Raises:
        DataError: names the first such row.
    """
    if not isinstance(dataset, Dataset):
        return
    for number, row in enumerate(dataset.select_columns("input_ids")):
        ids = row["input_ids"]
        read = shared.readable(ids)
        if read < len(ids):
            raise DataError(
                f"In the {name} dataset, row {number} holds token {ids[read]} of the teacher, which the student has "
                "not. Capture again with student_tokenizer, so that rows have the student's tokens, or train on a "
                "dataset that the student's tokenizer reads."
            )


def readable_rows(dataset: Any, vocabulary: Vocabulary, name: str) -> Any:
    """Refuse rows with a token that an output head of the run has no row for; a stream's rows as they come.

    Args:
        dataset: rows with ``input_ids``.
        vocabulary: of the run.
        name: how messages call it.

    Raises:
        DataError: names the first such row.
    """
    what = f"In the {name} dataset, row"
    if isinstance(dataset, Dataset):
        vocabulary.require_rows((row["input_ids"] for row in dataset.select_columns("input_ids")), what)
        return dataset
    return dataset.map(_Readable(vocabulary, what), with_indices=True)


@dataclass(frozen=True)
class _Readable:
    """Looks at one row of a stream, and changes nothing."""

    vocabulary: Vocabulary
    what: str

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        self.vocabulary.require_rows([row["input_ids"]], f"{self.what} {number}, part")
        return {}


@dataclass(frozen=True)
class _AddLabels:
    """Adds ``labels``: the token ids, and -100 where the mask is 0."""

    mask: str | None

    def __call__(self, table: pa.Table) -> pa.Table:
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        labels = pc.list_flatten(table["input_ids"]).to_numpy().astype(np.int64)
        if self.mask is not None:
            labels = np.where(pc.list_flatten(table[self.mask]).to_numpy() != 0, labels, -100)
            table = table.drop_columns([self.mask])
        ends = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
        return table.append_column("labels", pa.ListArray.from_arrays(ends, pa.array(labels)))
