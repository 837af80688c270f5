"""TRL's collator, with the cached targets of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from kd_plugin.cache.completeness import Untaught, taught_batch
from kd_plugin.cache.joining import TARGET
from kd_plugin.cache.joint import JointCache
from kd_plugin.errors import DataError


@dataclass
class TeacherTargetCollator:
    """Wraps TRL's collator, which builds only the fields that it knows.

    It runs in the data loader's workers, so that targets are read from disk ahead of the step.

    Attributes:
        inner: the collator of the SFT trainer.
        cache: where the columns ``teacher_index`` point to.
        untaught: what becomes of tokens with a label and no target.
    """

    inner: Any
    cache: JointCache
    untaught: Untaught

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``, and add under ``teacher_target`` what :func:`taught_batch` gathers, and ``ends``."""
        batch = self.inner(examples)
        if type(self.inner) is not DataCollatorForLanguageModeling:
            _require_unmoved(batch, examples, type(self.inner).__name__)
        indices = {column: [example[column] for example in examples] for column in self.cache.columns}
        batch["labels"], batch[TARGET] = taught_batch(self.cache, batch["labels"], indices, self.untaught)
        batch[TARGET]["ends"] = _ends(batch["labels"].shape, examples)
        return batch


def _ends(shape: Sequence[int], examples: list[dict[str, Any]]) -> list[int]:
    """Return where each example ends among the flattened (B * L) positions of its batch."""
    rows, length = shape
    padding_free = rows != len(examples)
    return list(accumulate(len(example["input_ids"]) if padding_free else length for example in examples))


def _require_unmoved(batch: Any, examples: list[dict[str, Any]], name: str) -> None:
    """Refuse a batch whose tokens are not where the targets expect them: each row at the left edge, whole, in order.

    Raises:
        DataError: the collator padded on the left, cut, packed or reordered rows, or gave no labels.
    """
    way_out = (
        "Leave data_collator out, or give one that keeps the order of the rows and their tokens, and pads on the right."
    )
    if "labels" not in batch or "input_ids" not in batch:
        raise DataError(f"The data collator {name} gives {sorted(batch)}; input_ids and labels are needed. {way_out}")
    ids = batch["input_ids"]
    for row, example in enumerate(examples):
        own = torch.as_tensor(example["input_ids"])
        if ids.shape[0] != len(examples) or not torch.equal(ids[row, : len(own)].cpu(), own.to(ids.dtype)):
            raise DataError(
                f"The data collator {name} moved the tokens of row {row} of a batch: cached targets would belong to "
                f"other ones. {way_out}"
            )
