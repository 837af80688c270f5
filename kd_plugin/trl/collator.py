"""Bring the cached targets of a batch together with its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_plugin.cache import TeacherCache

# Name under which a batch carries its targets to the student's forward pass
TARGET = "teacher_target"


@dataclass
class TeacherTargetCollator:
    """Wraps TRL's collator, which builds only the fields that it knows.

    It runs in the data loader's workers, so that targets are read from disk ahead of the step. The scored
    positions are found here, on the host: position t is scored where token t+1 has a label.

    Attributes:
        inner: the collator of the SFT trainer.
        cache: where ``teacher_index`` points to.
    """

    inner: Any
    cache: TeacherCache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``, and add the targets of their N scored positions.

        Returns:
            The inner collator's batch and, under ``teacher_target``, ``positions`` (N,) into the flattened
            (B * L), ``labels`` (N,), ``weights`` (N,) 0 where the cache holds nothing, and the targets' ``ids``,
            ``logprobs`` (N, K), ``tail_logmass`` (N,), and ``draws`` (N, K) where they were sampled.
        """
        batch = self.inner(examples)
        batch[TARGET] = self._targets(batch["labels"], [example["teacher_index"] for example in examples])
        return batch

    def _targets(self, labels: Tensor, indices: list[list[int]]) -> dict[str, Tensor]:
        rows, length = labels.shape
        padded = torch.full((rows, length), -1, dtype=torch.int64)
        if rows == len(indices):
            for row, index in enumerate(indices):
                padded[row, : len(index)] = torch.as_tensor(index)
        else:  # padding-free: one row holds all examples
            flat = [i for index in indices for i in index]
            padded[0, : len(flat)] = torch.as_tensor(flat)

        next_labels = torch.full_like(labels, -100)
        next_labels[:, :-1] = labels[:, 1:]
        positions = (next_labels.flatten() != -100).nonzero().flatten()
        wanted = padded.flatten()[positions]
        stored = wanted >= 0
        signal = self.cache.signal(wanted[stored])
        if bool(stored.all()):
            fields = {"ids": signal.ids, "logprobs": signal.logprobs, "tail_logmass": signal.tail_logmass}
            if signal.draws is not None:
                fields["draws"] = signal.draws
        else:
            fields = _spread(signal, stored)
        return {
            "positions": positions,
            "labels": next_labels.flatten()[positions],
            "weights": stored.float(),
            **fields,
        }


def _spread(signal: Any, stored: Tensor) -> dict[str, Tensor]:
    """Give the positions without a target an empty one: no token listed, all mass in the tail."""
    count, width = stored.numel(), signal.ids.shape[1]

    def spread(values: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
        out = values.new_full(shape, fill)
        out[stored] = values
        return out

    fields = {
        "ids": spread(signal.ids, (count, width), 0),
        "logprobs": spread(signal.logprobs, (count, width), -torch.inf),
        "tail_logmass": spread(signal.tail_logmass, (count,), 0.0),
    }
    if signal.draws is not None:
        fields["draws"] = spread(signal.draws, (count, width), 0)
    return fields
