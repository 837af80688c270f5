"""Any collator, with the cached targets of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kd_plugin.cache.joining import TARGET, Untaught, targets_within, taught_batch
from kd_plugin.cache.joint import JointCache
from kd_plugin.errors import DataError
from kd_plugin.vocab import Vocabulary


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


@dataclass(frozen=True)
class CachedRowCollator:
    """Makes batches of a cache's own rows, which have a target for each token of theirs that is trained on.

    Attributes:
        cache: whose ``dataset()`` the rows are of.
        max_length: tokens kept from the start of a row; None keeps all.
    """

    cache: JointCache
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad on the right, and gather the targets of the N scored positions under ``teacher_target``."""
        cut = slice(None, self.max_length)
        ids = [torch.as_tensor(row["input_ids"][cut]) for row in rows]
        input_ids, attention_mask = _padded(ids), _padded([torch.ones_like(one) for one in ids])
        trained = _padded([torch.as_tensor(row["completion_mask"][cut]) for row in rows])
        labels = torch.where(trained == 1, input_ids, -100)
        indices = {column: [row[column][cut] for row in rows] for column in self.cache.columns}
        labels, target = taught_batch(self.cache, labels, indices, "refuse")
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, TARGET: target}


def target_of(batch: Mapping[str, Any], cache: JointCache, untaught: Untaught, vocabulary: Vocabulary) -> Any:
    """Return the targets of a batch: those that its collator gathered, or what the columns ``teacher_index`` point to.

    Args:
        batch: with ``teacher_target``; or with the columns of ``cache``, each (B, L), and perhaps ``labels`` (B, L).
            Without labels the positions with a target are scored.
        cache: the cache, cut to ``vocabulary``.
        untaught: what becomes of tokens with a label and no target.
        vocabulary: of the run; a loader does not know the student.

    Raises:
        DataError: a token has a label and no target, and ``untaught`` is ``refuse``.
    """
    if TARGET in batch:
        return targets_within(batch[TARGET], vocabulary.size) if vocabulary.is_cut else batch[TARGET]
    # A collator that gathers targets in the loader's workers, as those above do, saves this copy
    indices = {column: batch[column].cpu() for column in cache.columns}
    labels = batch.get("labels")
    return cache.targets(None, indices) if labels is None else taught_batch(cache, labels.cpu(), indices, untaught)[1]


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
