"""Any collator, with the cached targets of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kd_plugin.cache.joining import TARGET, Untaught, taught_batch
from kd_plugin.cache.joint import JointCache
from kd_plugin.errors import DataError


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
