"""Start a panel run off-policy: the first steps fit what teachers once generated, from a teacher cache.

A student that puts no mass where its teachers do learns slowly from its own rollouts (reverse KL cannot reward what
is never generated); a few steps on the teachers' own text bring it onto their support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.cache.alignment import require_aligned
from kd_plugin.cache.joining import batch_targets
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.training_rows import require_shared
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.objective import OfflineObjective
from kd_plugin.errors import ConfigError
from kd_plugin.rollouts.rows import by_length
from kd_plugin.signals import OutputHead
from kd_plugin.vocab import Vocabulary


def warmup_objective(caches: Sequence[TeacherCache], divergence: str) -> OfflineObjective:
    """Return what the warm-up minimises, at the temperature that the caches were captured at."""
    return OfflineObjective(Divergence(divergence), temperature=caches[0].manifest.settings.temperature)


def require_fitting(caches: Sequence[TeacherCache], vocabulary: Vocabulary, *, allow_misaligned: bool = False) -> None:
    """Refuse caches of other tokens, of several temperatures, or whose targets stand at the wrong places.

    Raises:
        VocabularyError: another tokenizer.
        CacheError: another temperature than the first cache's, or targets that do not fit their tokens.
    """
    for cache in caches:
        cache.require_compatible(vocabulary, temperature=caches[0].manifest.settings.temperature)
        require_aligned(cache, allow_misaligned=allow_misaligned)
        shared = cache.shared_with(vocabulary)
        if shared is not None:
            require_shared(cache.dataset(), shared, str(cache.path))
        elif vocabulary.is_cut:
            vocabulary.require_rows(cache.dataset()["input_ids"], f"In {cache.path}, row")


def warmup_loss(
    objective: OfflineObjective, hidden: Tensor, head: OutputHead, targets: Sequence[dict[str, Tensor]]
) -> tuple[Tensor, Tensor, int]:
    """Return the offline loss of a micro-batch of cached rows.

    Args:
        objective: see :func:`warmup_objective`.
        hidden: (B, L, H) last hidden states of the student.
        head: its output head, cut to the vocabulary.
        targets: of a :class:`WarmupBatch`.

    Returns:
        The loss, a sum in nats with a graph also where nothing is scored; the summed entropy, detached; how many
        positions are scored.
    """
    losses = [objective.loss(hidden, head, target) for target in targets]
    loss_sum = hidden.sum() * 0.0 + sum(loss.loss_sum for loss in losses)
    entropy = loss_sum.new_zeros(()) + sum(loss.entropy.sum() for loss in losses)
    return loss_sum, entropy.detach(), sum(target["positions"].numel() for target in targets)


@dataclass(frozen=True)
class WarmupBatch:
    """A micro-batch of cached rows.

    Attributes:
        input_ids: (B, L) int64, padded on the right.
        attention_mask: (B, L) 1 for tokens.
        labels: (B, L) the completions' tokens, -100 elsewhere.
        targets: what :func:`~kd_plugin.cache.joining.batch_targets` gathers, one a cache that has rows here.
        scored: scored positions of the whole optimizer step, over all ranks and all micro-batches that are run.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    targets: tuple[dict[str, Tensor], ...]
    scored: int

    @property
    def tokens(self) -> int:
        """Scored positions of this micro-batch."""
        return sum(target["positions"].numel() for target in self.targets)

    def to(self, device: torch.device) -> WarmupBatch:
        """Move what the student's forward pass takes to ``device``; the loss moves the targets."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "labels")}
        return replace(self, **moved)


class CacheWarmup:
    """Assigns the rows of some caches to optimizer steps.

    Which rows a step gets depends on the seed, the step and the shape of the batch alone: nothing has to be saved for
    a run to resume, and every rank knows the whole step's number of tokens without asking the others.

    Args:
        caches: at least one; rows of all are mixed.
        seed: of the order; each pass over the rows has its own.
        pad_token_id: fills up short rows.
        max_length: tokens kept from the start of a row; None keeps all.

    Raises:
        ConfigError: no cache is given.
    """

    def __init__(
        self, caches: Sequence[TeacherCache], *, seed: int, pad_token_id: int, max_length: int | None = None
    ) -> None:
        if not caches:
            raise ConfigError("A warm-up needs at least one teacher cache; got none.")
        self.caches = tuple(caches)
        self._seed = seed
        self._pad = pad_token_id
        self._max_length = max_length
        self._rows = [cache.dataset().with_format("numpy") for cache in self.caches]
        self._masks = [rows.select_columns(["completion_mask"]) for rows in self._rows]
        self._assigned: tuple[tuple[int, ...], list[int], int] = ((), [], 0)  # which step of whom, and what it is
        self._ends = torch.tensor([len(rows) for rows in self._rows]).cumsum(0)
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(
        self, step: int, micro_step: int, rows: int, *, micro_steps: int, rank: int, ranks: int, run: int | None = None
    ) -> WarmupBatch:
        """Return one rank's micro-batch; in a step's first are the longest of the rank's rows.

        Args:
            step: optimizer step, from 0.
            micro_step: which of the step's ``micro_steps``.
            rows: rows of a micro-batch.
            micro_steps: gradient accumulation steps.
            rank: of this process.
            ranks: number of processes.
            run: how many of the ``micro_steps`` are run, where an epoch ends before; None for all.
        """
        asked = (step, rows * micro_steps, rank, ranks, rows * (micro_steps if run is None else run))
        if self._assigned[0] != asked:
            self._assigned = asked, *self._assign(*asked)
        _, mine, scored = self._assigned
        return self._collated(mine[micro_step * rows :][:rows], scored)

    def _assign(self, step: int, rows: int, rank: int, ranks: int, run: int) -> tuple[list[int], int]:
        """Return a rank's rows of a step, the longest first, and how many positions each rank's first ``run`` score."""
        numbers = [self._nth(step * rows * ranks + i) for i in range(rows * ranks)]
        masks = [self._mask(number) for number in numbers]
        own: list[int] = []
        scored = 0
        for other in range(ranks):
            first = other * rows
            order = [first + i for i in by_length([len(mask) for mask in masks[first : first + rows]])]
            scored += sum(int(masks[i][1:].sum()) for i in order[:run])
            if other == rank:
                own = [numbers[i] for i in order]
        return own, scored

    def _nth(self, position: int) -> int:
        """Return the row at a position of the endless sequence of shuffled passes."""
        epoch, within = divmod(position, len(self))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self), generator=generator)
        return int(self._orders[epoch][within])

    def _place(self, number: int) -> tuple[int, int]:
        """Return which cache a row is in, and its number there."""
        cache = int(torch.searchsorted(self._ends, number, right=True))
        return cache, number - (int(self._ends[cache - 1]) if cache else 0)

    def _row(self, number: int) -> tuple[int, dict[str, Any]]:
        """Return which cache a row is in, and the row."""
        cache, within = self._place(number)
        row = self._rows[cache][within]
        cut = slice(0, self._max_length)
        return cache, {
            name: torch.as_tensor(row[name])[cut] for name in ("input_ids", "completion_mask", "teacher_index")
        }

    def _mask(self, number: int) -> Any:
        cache, within = self._place(number)
        return self._masks[cache][within]["completion_mask"][: self._max_length]

    def _collated(self, numbers: Sequence[int], scored: int) -> WarmupBatch:
        found = [self._row(number) for number in numbers]
        lengths = [len(row["input_ids"]) for _, row in found]
        shape = (len(found), max(lengths))
        ids, mask = torch.full(shape, self._pad), torch.zeros(shape, dtype=torch.int64)
        for b, (_, row) in enumerate(found):
            ids[b, : lengths[b]] = row["input_ids"]
            mask[b, : lengths[b]] = 1
        targets, whole = [], torch.full(shape, -100)
        for c, cache in enumerate(self.caches):
            labels = torch.full(shape, -100)
            for b, (owner, row) in enumerate(found):
                if owner == c:
                    labels[b, : lengths[b]] = torch.where(row["completion_mask"].bool(), row["input_ids"], -100)
            whole = torch.where(labels == -100, whole, labels)
            if (labels[:, 1:] != -100).any():
                targets.append(batch_targets(cache, labels, [row["teacher_index"].tolist() for _, row in found]))
        return WarmupBatch(ids, mask, whole, tuple(targets), scored)
