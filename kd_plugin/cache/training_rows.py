"""A trainer's rows and batches with the targets of a cache: labelled, looked up, surveyed, cut and collated.

Whole columns are worked on where they can be: a row at a time takes minutes for a million rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from kd_plugin.cache.joining import TARGET, Untaught, kept_tokens, require_complete, survey, taught_batch
from kd_plugin.cache.joint import JointCache
from kd_plugin.errors import DataError
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)


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
        present = getattr(dataset, "column_names", None) or list(next(iter(dataset)))
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
        if isinstance(dataset, Dataset) and "labels" in present:
            dataset = self._surveyed(dataset, name, window, why)
        return readable_rows(dataset, self.vocabulary, name) if self.vocabulary.is_cut else dataset

    def _surveyed(self, dataset: Dataset, name: str, window: Window, why: str) -> Dataset:
        found = survey(dataset, self.cache, window.max_length, window.keep_end)
        if not self.allow_partial:
            require_complete(found, self.cache, name, why)
        elif found.missing:
            logger.warning(
                f"{found.missing} of {found.tokens} trained tokens of the {name} dataset have no target, among "
                f"them those of {len(found.absent)} of {found.rows} rows that are not in the cache."
            )
            if not self.keep_untaught:
                return dataset.select(found.taught)
        return dataset


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
        _Labels("completion_mask" if completion_only else None), batched=True, desc=f"Building labels for {name} rows"
    )
    return labelled.with_format(None)


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
class _Labels:
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


@dataclass
class TeacherTargetCollator:
    """Wraps a collator, which need not know of targets.

    It runs in the data loader's workers, so that targets are read from disk ahead of the step.

    Attributes:
        inner: a collator that pads on the right, or puts all examples into one row, one after the other.
        cache: where the columns ``teacher_index`` point to.
        untaught: what becomes of tokens with a label and no target.
    """

    inner: Any
    cache: JointCache
    untaught: Untaught

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``, and add under ``teacher_target`` what :func:`taught_batch` gathers, and ``ends``.

        ``ends`` says where each example ends among the flattened (B * L) positions of the batch.

        Raises:
            DataError: the collator padded on the left, cut or reordered rows, or gave no labels.
        """
        columns = self.cache.columns
        batch = self.inner([{k: v for k, v in example.items() if k not in columns} for example in examples])
        if "labels" not in batch or "input_ids" not in batch:
            raise self._unfit(f"gives {sorted(batch)}; input_ids and labels are needed")
        rows = [torch.as_tensor(example["input_ids"]) for example in examples]
        padding_free = batch["labels"].shape[0] != len(rows)
        self._require_unmoved(batch["input_ids"], [torch.cat(rows)] if padding_free else rows)
        indices = {column: [example[column] for example in examples] for column in columns}
        batch["labels"], batch[TARGET] = taught_batch(self.cache, batch["labels"], indices, self.untaught)
        width = batch["labels"].shape[1]
        batch[TARGET]["ends"] = list(accumulate(len(row) if padding_free else width for row in rows))
        return batch

    def _require_unmoved(self, ids: Tensor, rows: list[Tensor]) -> None:
        """Refuse a batch whose tokens are not where the targets expect them: at the left edge, whole, in order."""
        for number, row in enumerate(rows):
            if len(ids) != len(rows) or not torch.equal(ids[number, : len(row)].cpu(), row.to("cpu", ids.dtype)):
                raise self._unfit(
                    f"moved the tokens of row {number} of a batch: cached targets would belong to other ones"
                )

    def _unfit(self, what: str) -> DataError:
        return DataError(
            f"The data collator {type(self.inner).__name__} {what}. Leave data_collator out, or give one that keeps "
            "the order of the rows and their tokens, and pads on the right."
        )
