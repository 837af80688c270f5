"""Bring the cached targets of a batch together with its tokens, and rows together with the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.errors import DataError
from kd_plugin.signals import SparseSignal

# Name under which a batch carries its targets to the student's forward pass
TARGET = "teacher_target"


def batch_targets(
    cache: TeacherCache, labels: Tensor | None, indices: Sequence[Sequence[int]] | Tensor
) -> dict[str, Tensor]:
    """Gather the targets of a batch's N scored positions: position t is scored where token t+1 has a label.

    Everything happens on the CPU, so that a data loader's workers do it ahead of the step.

    Args:
        cache: where ``indices`` point to.
        labels: (B, L) next-token labels as transformers takes them, -100 for none. None scores the positions that
            have a target.
        indices: the ``teacher_index`` of each example, unpadded, or (B, L) padded with -1. There are more examples
            than rows where a padding-free row holds all of them.

    Returns:
        ``positions`` (N,) into the flattened (B * L), ``labels`` (N,), ``weights`` (N,) 0 where the cache holds
        nothing, and the targets' ``ids``, ``logprobs`` (N, K), ``tail_logmass`` (N,), and ``draws`` (N, K) where they
        were sampled.
    """
    if labels is None:
        labels = labels_of_targets(torch.as_tensor(indices))
    padded = padded_index(labels.shape, indices)
    next_labels = torch.full_like(labels, -100)
    next_labels[:, :-1] = labels[:, 1:]
    positions = (next_labels.flatten() != -100).nonzero().flatten()
    wanted = padded.flatten()[positions]
    stored = wanted >= 0
    signal = cache.signal(wanted[stored])
    if bool(stored.all()):
        fields = {"ids": signal.ids, "logprobs": signal.logprobs, "tail_logmass": signal.tail_logmass}
        if signal.draws is not None:
            fields["draws"] = signal.draws
    else:
        fields = _spread(signal, stored)
    return {
        "positions": positions,
        "labels": next_labels.flatten()[positions].where(next_labels.flatten()[positions] >= 0, -100),
        "weights": (fields["draws"].sum(1) > 0 if "draws" in fields else stored).float(),
        **fields,
    }


def targets_within(target: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Cut what :func:`batch_targets` gathered to the first ``vocab_size`` tokens, those of other teachers too."""
    signal = SparseSignal(target["ids"], target["logprobs"], target["tail_logmass"], target.get("draws"))
    cut = signal.within(vocab_size)
    found = {**target, "ids": cut.ids, "logprobs": cut.logprobs, "tail_logmass": cut.tail_logmass}
    if cut.draws is not None:
        found |= {"draws": cut.draws, "weights": target["weights"] * (cut.draws.sum(1) > 0)}
    if "others" in target:
        found["others"] = [targets_within(other, vocab_size) for other in target["others"]]
    return found


def padded_index(shape: Sequence[int], indices: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """Return the ``teacher_index`` of a batch as (B, L) int64, -1 for none; see :func:`batch_targets`."""
    if isinstance(indices, Tensor) and indices.shape == tuple(shape):
        return indices
    padded = torch.full(tuple(shape), -1, dtype=torch.int64)
    if len(padded) == len(indices):
        for row, index in enumerate(indices):
            padded[row, : len(index)] = torch.as_tensor(index)
    else:  # padding-free: one row holds all examples
        flat = [i for index in indices for i in index]
        padded[0, : len(flat)] = torch.as_tensor(flat)
    return padded


def not_in_cache(cache: object, what: str, where: str, why: str = "") -> DataError:
    """Return the error for rows that the cache does not hold.

    Args:
        cache: the cache, named by its path.
        what: which rows, such as ``"2 of 8 rows of the train dataset"``.
        where: which is the first.
        why: what is known of the cause; a sentence, or nothing.
    """
    why = f"{why} " if why else ""
    return DataError(
        f"{what} are not in the teacher cache {cache}; {where}. {why}Rows are joined by their token ids, so the same "
        "tokenizer, chat template and text as at capture are needed. Capture these rows too, leave train_dataset out "
        "to train on the cache's own rows, or set allow_partial=True to train without their targets."
    )


def labels_of_targets(indices: Tensor) -> Tensor:
    """Return labels (B, L) that score the positions with a target, and name no token: -1 counts, -100 does not."""
    scored = torch.roll(indices >= 0, 1, dims=1)
    scored[:, 0] = False
    return torch.where(scored, -1, -100)


def _spread(signal: Any, stored: Tensor) -> dict[str, Tensor]:
    """Give the positions without a target an empty one: no token listed, all mass in the tail."""
    count, width = stored.numel(), max(signal.ids.shape[1], 1)

    def spread(values: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
        out = values.new_full(shape, fill)
        out[stored, ...] = values if values.numel() else fill
        return out

    fields = {
        "ids": spread(signal.ids, (count, width), 0),
        "logprobs": spread(signal.logprobs, (count, width), -torch.inf),
        "tail_logmass": spread(signal.tail_logmass, (count,), 0.0),
    }
    if signal.draws is not None:
        fields["draws"] = spread(signal.draws, (count, width), 0)
    return fields
