"""What passes through the on-policy step, and what the step asks of the trainer that runs it.

Assigned rows, scored rollouts, their micro-batches, and the loss of one.

Shape suffixes: B rows, W columns of the longest row, C response columns, N scored positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_plugin.panel.roster import Assignment
from kd_plugin.panel.scoring import RowScores, scored_positions
from kd_plugin.rollouts.responses import Response
from kd_plugin.rollouts.rows import Rollouts, by_length, left_aligned
from kd_plugin.signals import OutputHead


@dataclass(frozen=True)
class Assigned:
    """Rows of a generation batch, before there are responses.

    Attributes:
        assignments: for each row which teachers score it.
        given: for each row the dataset's completion, as token ids; None where the student generates.
        rows_at_once: rows in a teacher's forward pass.
        rows: their columns, of which views read some; empty where nothing reads them.
    """

    assignments: tuple[Assignment, ...]
    given: tuple[list[int] | None, ...]
    rows_at_once: int
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a generation batch that are trained on in one forward pass; each begins in column 0.

    Attributes:
        input_ids: (B, W) int64, padded on the right.
        attention_mask: (B, W).
        scores: what the panel said, one a row.
        responses: one a row.
        starts: for each row the column of its first response token.
        anchor: what the student's start said, one a row; empty where there is no anchor.
        behaviour_logprobs: (N,) nats of the scored tokens where they were drawn; None if by this student.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scores: tuple[RowScores, ...]
    responses: tuple[Response, ...]
    starts: tuple[int, ...]
    anchor: tuple[RowScores, ...] = ()
    behaviour_logprobs: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return sum(len(one.positions) for one in self.scores)

    @cached_property
    def labels(self) -> Tensor:
        """(B, W) the response tokens of rows that are scored, -100 elsewhere."""
        device = self.input_ids.device
        width = self.input_ids.shape[1]
        starts = [at if c.positions else width for at, c in zip(self.starts, self.scores, strict=True)]
        first = torch.tensor(starts).to(device, non_blocking=True).unsqueeze(1)
        responds = (torch.arange(width, device=device) >= first) & (self.attention_mask != 0)
        return self.input_ids.masked_fill(~responds, -100)

    def predicted_at(self, width: int) -> Tensor:
        """Return (N,) where in hidden states of ``width`` columns, flattened, the scored tokens are predicted."""
        return scored_positions(self.scores, width, self.input_ids.device, [start - 1 for start in self.starts])

    def scored_tokens(self) -> Tensor:
        """Return (N,) the tokens that are scored, row by row."""
        where = scored_positions(self.scores, self.input_ids.shape[1], self.input_ids.device, self.starts)
        return self.input_ids.reshape(-1).index_select(0, where)

    def with_heads(self, heads: Mapping[str, OutputHead]) -> MicroBatch:
        """Return the micro-batch with these heads, which were gathered, in the signals of the teachers so named."""
        if not heads:
            return self
        return replace(self, scores=tuple(one.with_heads(heads) for one in self.scores))


@dataclass(frozen=True)
class ScoredRollouts:
    """A generation batch of B rows with what the panel said of it.

    Attributes:
        rollouts: the rows.
        scores: one a row.
        anchor: what the student's start said, one a row; empty where there is no anchor.
        behaviour_logprobs: (B, C) nats of the response tokens where they were drawn; None if by this student.
    """

    rollouts: Rollouts
    scores: tuple[RowScores, ...]
    anchor: tuple[RowScores, ...] = ()
    behaviour_logprobs: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of scored positions."""
        return sum(len(one.positions) for one in self.scores)

    def longest_first(self, ties: Sequence[int] | None = None) -> list[int]:
        """Return row numbers, rows of like length together; ``ties`` decides between rows of one length."""
        return by_length([one.span.length for one in self.scores], ties)

    def micro_batches(self, sizes: Sequence[int], order: Sequence[int] | None = None) -> list[MicroBatch]:
        """Split the rows into micro-batches, whose losses add up to the same whatever rows each has.

        Args:
            sizes: rows of each micro-batch; they sum to B.
            order: row numbers; left out, the order of the rows.
        """
        index = torch.arange(len(self.scores)) if order is None else torch.tensor(order, dtype=torch.int64)
        return [self._select(rows.tolist()) for rows in index.split(list(sizes))]

    def _select(self, rows: list[int]) -> MicroBatch:
        rollouts = self.rollouts
        device = rollouts.input_ids.device
        scores = tuple(self.scores[row] for row in rows)
        index = torch.tensor(rows).to(device, non_blocking=True)
        ids, mask = (tensor.index_select(0, index) for tensor in (rollouts.input_ids, rollouts.attention_mask))
        spans = [one.span for one in scores]
        behaviour = self.behaviour_logprobs
        if behaviour is not None:
            flat = behaviour.index_select(0, index).reshape(-1)
            behaviour = flat.index_select(0, scored_positions(scores, behaviour.shape[1], device))
        return MicroBatch(
            *left_aligned(ids, mask, spans),
            scores,
            tuple(rollouts.responses[row] for row in rows),
            tuple(rollouts.completion_start - span.first for span in spans),
            tuple(self.anchor[row] for row in rows) if self.anchor else (),
            behaviour,
        )


@dataclass(frozen=True)
class StepLoss:
    """The loss of a micro-batch; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, in nats, the anchor's part included.
        divergence_sum: of it the divergence from the teachers, detached.
        entropy_sum: nats, of the student's distribution, detached.
        tokens: N.
    """

    loss_sum: Tensor
    divergence_sum: Tensor
    entropy_sum: Tensor
    tokens: int

    def own_mean(self) -> Tensor:
        """Return the mean loss per token, which stands for the student's own loss where it forms none; no graph."""
        return self.loss_sum.detach() / max(self.tokens, 1)


class Host(Protocol):
    """A trainer, as the step and the monitor see it.

    A host has three things of its own: how it is called, how its student generates (a
    :class:`~kd_plugin.rollouts.RolloutEngine`), and how a sum over tokens is divided.
    """

    @property
    def device(self) -> torch.device:
        """Where the student computes."""
        ...

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def ranks(self) -> int:
        """Number of processes."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        ...

    @property
    def training(self) -> bool:
        """Whether the present batch is trained on, and not evaluated."""
        ...

    @property
    def is_logged(self) -> bool:
        """Whether what is seen of the present batch is logged when its optimizer step is done."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor of each rank; a collective call."""
        ...

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep what a generation batch was like until the next log."""
        ...

    def stop(self) -> None:
        """Save what was learned, and end training."""
        ...

    def lower_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate, and the schedule that goes on from it."""
        ...
