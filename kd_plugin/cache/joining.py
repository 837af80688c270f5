"""Bring the cached targets of a batch together with its tokens, and rows together with the cache.

A token with a label and no target would stay in the divisor and shrink the loss without a word. So it is refused, or,
where the user takes a partial cache, the divergence is a mean over the tokens that have a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.errors import DataError
from kd_plugin.signals import SparseSignal
from kd_plugin.vocab import SharedTokens, Vocabulary

if TYPE_CHECKING:
    from kd_plugin.cache.joint import JointCache

# Name under which a batch carries its targets to the student's forward pass
TARGET = "teacher_target"
# What becomes of a token with a label and no target: it is an error; it loses its label; or it keeps the label for the
# cross-entropy alone
Untaught = Literal["refuse", "leave out", "keep"]
_ROWS = 1000  # looked at in one go


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


def targets_for(target: dict[str, Any], vocabulary: Vocabulary, shared: SharedTokens | None) -> dict[str, Any]:
    """Cut what :func:`batch_targets` gathered to the tokens that a student has, those of other teachers too.

    Args:
        target: of a loader, which does not know the student.
        vocabulary: of the run.
        shared: what the caches share with it; None where they have its tokens.
    """
    if shared is None and not vocabulary.is_cut:
        return target
    signal = SparseSignal(target["ids"], target["logprobs"], target["tail_logmass"], target.get("draws"))
    cut = signal.within(vocabulary.size) if shared is None else signal.over(shared)
    found = {**target, "ids": cut.ids, "logprobs": cut.logprobs, "tail_logmass": cut.tail_logmass}
    if cut.draws is not None:
        found |= {"draws": cut.draws, "weights": target["weights"] * (cut.draws.sum(1) > 0)}
    if "others" in target:
        found["others"] = [targets_for(other, vocabulary, shared) for other in target["others"]]
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


def untaught_tokens(allow_partial: bool, ce_weight: float) -> Untaught:
    """Return what becomes of tokens without a target."""
    if not allow_partial:
        return "refuse"
    return "keep" if ce_weight > 0 else "leave out"


def taught_batch(
    cache: JointCache,
    labels: Tensor,
    indices: Mapping[str, Sequence[Sequence[int]] | Tensor],
    untaught: Untaught,
) -> tuple[Tensor, dict[str, Any]]:
    """Gather the targets of a batch.

    Args:
        cache: where ``indices`` point to.
        labels: (B, L) next-token labels as transformers takes them, -100 for none.
        indices: by name in ``cache.columns`` that column of the batch, as :meth:`JointCache.targets` takes it.
        untaught: what becomes of tokens with a label and no target.

    Returns:
        The labels that are trained on, and what :meth:`JointCache.targets` gathers for them.

    Raises:
        DataError: ``untaught`` is ``refuse``, and there are some.
    """
    padded = {column: padded_index(labels.shape, indices[column]) for column in cache.columns}
    held = torch.stack([padded[column] for column in cache.taught_columns]).amax(0) >= 0
    missing = labels != -100
    missing[:, 0] = False
    missing[:, 1:] &= ~held[:, :-1]
    if bool(missing.any()):
        if untaught == "refuse":
            row, token = missing.nonzero()[0].tolist()
            raise without_target(
                cache, f"{int(missing.sum())} trained tokens of a batch", f"the first is token {token} of its row {row}"
            )
        if untaught == "leave out":
            labels = labels.masked_fill(missing, -100)
    target = cache.targets(labels, padded)
    mean_over_taught([target], target["positions"].numel(), target["taught"])
    return labels, target


def taught_positions(target: Mapping[str, Any]) -> Tensor:
    """Return which of a batch's N scored positions have a target, (N,) bool; ``target`` is :func:`taught_batch`'s."""
    taught: Tensor = target["weights"] > 0
    for other in target.get("others", ()):
        taught[torch.searchsorted(target["positions"], other["positions"])] = True
    return taught


def mean_over_taught(targets: Iterable[dict[str, Any]], labelled: float, taught: float) -> None:
    """Have what divides a summed loss by the tokens with a label divide the divergence by those with a target.

    Args:
        targets: of the micro-batches that are divided by one number.
        labelled: their tokens with a label, over all ranks.
        taught: those of them that have a target.
    """
    for target in targets:
        target["kd_factor"] = labelled / taught if taught > 0 else 1.0


@dataclass(frozen=True)
class Survey:
    """What a dataset's rows lack, counting the tokens alone that training will keep.

    Attributes:
        rows: number of rows.
        tokens: tokens with a label.
        missing: those of them that have no target.
        absent: numbers of the rows with a label that no cache holds.
        taught: numbers of the rows that have a label with a target.
        first: row and token of the first that is missing, or None.
    """

    rows: int
    tokens: int
    missing: int
    absent: NDArray[np.int64]
    taught: NDArray[np.int64]
    first: tuple[int, int] | None


def survey(dataset: Any, cache: JointCache, max_length: int | None = None, keep_end: bool = False) -> Survey:
    """Look through a ``datasets.Dataset`` with ``labels`` and the columns of ``cache``.

    Args:
        dataset: whole rows.
        cache: what they were joined with.
        max_length: tokens that training will keep of each; None for all.
        keep_end: whether it keeps the last ones.
    """
    columns = cache.taught_columns
    parts = dataset.select_columns(["labels", *columns]).with_format("arrow").iter(_ROWS)
    tokens = missing = seen = 0
    first: tuple[int, int] | None = None
    absent, taught = [], []
    for table in parts:
        labels, lengths = _flat(table["labels"])
        held = np.zeros(len(labels), bool)
        for column in columns:
            held |= _flat(table[column])[0] >= 0
        trained = (labels != -100) & kept_tokens(lengths, max_length, keep_end)
        has_target = np.append(False, held[:-1])
        row = np.repeat(np.arange(len(lengths)), lengths)
        without = np.flatnonzero(trained & ~has_target)
        if first is None and len(without):
            start = int((np.cumsum(lengths) - lengths)[row[without[0]]])
            first = seen + int(row[without[0]]), int(without[0]) - start
        tokens, missing = tokens + int(trained.sum()), missing + len(without)
        held_rows = np.bincount(row[held], minlength=len(lengths)) > 0
        absent.append(seen + np.setdiff1d(row[trained], np.flatnonzero(held_rows)))
        taught.append(seen + np.unique(row[trained & has_target]))
        seen += len(lengths)
    return Survey(seen, tokens, missing, np.concatenate(absent), np.concatenate(taught), first)


def kept_tokens(lengths: NDArray[np.int64], max_length: int | None, keep_end: bool) -> NDArray[np.bool_]:
    """Return for each token of rows of ``lengths`` whether it is predicted once training has cut the rows."""
    starts = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    if max_length is None:
        return place > 0
    if keep_end:
        return place > np.repeat(np.maximum(lengths - max_length, 0), lengths)
    return (place > 0) & (place < max_length)


def require_complete(found: Survey, cache: JointCache, name: str, why: str = "") -> None:
    """Refuse rows of which a trained token has no target.

    Args:
        found: of the rows.
        cache: what they were joined with.
        name: of the dataset.
        why: what is known of the cause where whole rows are missing; a sentence, or nothing.

    Raises:
        DataError: says how many, which is the first, and the ways out.
    """
    if len(found.absent):
        what = f"{len(found.absent)} of {found.rows} rows of the {name} dataset"
        raise not_in_cache(cache, what, f"the first is row {found.absent[0]}", why)
    if found.first is not None:
        row, token = found.first
        what = f"{found.missing} of {found.tokens} trained tokens of the {name} dataset"
        raise without_target(cache, what, f"the first is token {token} of row {row}")


def without_target(cache: JointCache, what: str, where: str) -> DataError:
    """Return the error for tokens that are trained on and have no target, in rows that the cache holds."""
    scored = "; ".join(dict.fromkeys(member.cache.manifest.settings.scored for member in cache.members))
    return DataError(
        f"{what} have no target in the teacher cache {cache}; {where}. The capture scored {scored}. Train on these "
        "tokens alone (completion_only_loss, assistant_only_loss, max_length and truncation_mode say which are "
        "trained on; in Lightning the labels do), capture the others too, or set allow_partial=True: then the "
        "divergence is a mean over the tokens that have a target."
    )


def _flat(column: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    import pyarrow.compute as pc

    return pc.list_flatten(column).to_numpy(), pc.list_value_length(column).to_numpy().astype(np.int64)
