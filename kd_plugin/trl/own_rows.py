"""Labels for the rows of a cache, a thousand at a time: the host's own loop takes minutes for a million rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from kd_plugin.vocab import Vocabulary


def with_labels(dataset: Any, columns: list[str], completion_only: bool, name: str) -> Any:
    """Add the labels that TRL 1.16 would build, and leave out the mask that they came from.

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
