"""What passes through the on-policy step, and what the step asks of the trainer that runs it.

Assigned rows, scored rollouts, their micro-batches, the loss of one, and means of them that are logged.

Shape suffixes: B rows, W columns of the longest row, C response columns, N scored positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kd_plugin.panel.roster import Assignment
from kd_plugin.panel.scoring import RowScores, scored_positions
from kd_plugin.panel.text.corrections import Corrections
from kd_plugin.rollouts.rows import Response, Rollouts, by_length, left_aligned
from kd_plugin.signals import OutputHead

if TYPE_CHECKING:
    from kd_plugin.panel.loss import MicroBatchLoss


@dataclass(frozen=True)
class Assigned:
    """Rows of a generation batch, before there are responses.

    Attributes:
        assignments: for each row which teachers score it.
        given: for each row the dataset's completion, as token ids; None where the student generates.
        rows_at_once: rows in a teacher's forward pass.
        rows: their columns, of which views and verifiers read some; empty where nothing reads them.
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
        pairs: rows that are compared: a correction's, and that of the response that it corrects.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scores: tuple[RowScores, ...]
    responses: tuple[Response, ...]
    starts: tuple[int, ...]
    anchor: tuple[RowScores, ...] = ()
    behaviour_logprobs: Tensor | None = None
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """N."""
        return sum(len(one.positions) for one in self.scores)

    @cached_property
    def labels(self) -> Tensor:
        """(B, W) the response tokens of rows that a teacher scored or wrote, -100 elsewhere."""
        device = self.input_ids.device
        width = self.input_ids.shape[1]
        starts = [at if c.positions and c.signals else width for at, c in zip(self.starts, self.scores, strict=True)]
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
        corrections: rows that text teachers added; each is trained on with the row that it belongs to.
    """

    rollouts: Rollouts
    scores: tuple[RowScores, ...]
    anchor: tuple[RowScores, ...] = ()
    behaviour_logprobs: Tensor | None = None
    corrections: Corrections | None = None

    @property
    def tokens(self) -> int:
        """Number of scored positions, those of corrections included."""
        further = () if self.corrections is None else self.corrections.scores
        return sum(len(one.positions) for one in (*self.scores, *further))

    def longest_first(self, ties: Sequence[int] | None = None) -> list[int]:
        """Return row numbers, rows of like length together; ``ties`` decides between rows of one length."""
        lengths = [one.span.length for one in self.scores]
        if self.corrections is not None:
            for row, one in zip(self.corrections.of, self.corrections.scores, strict=True):
                lengths[row] = max(lengths[row], one.span.length)
        return by_length(lengths, ties)

    def micro_batches(self, sizes: Sequence[int], order: Sequence[int] | None = None) -> list[MicroBatch]:
        """Split the rows into micro-batches, whose losses add up to the same whatever rows each has.

        Args:
            sizes: rows of each micro-batch; they sum to B.
            order: row numbers; left out, the order of the rows.
        """
        index = torch.arange(len(self.scores)) if order is None else torch.tensor(order, dtype=torch.int64)
        return [self._select(rows.tolist()) for rows in index.split(list(sizes))]

    def _select(self, rows: list[int]) -> MicroBatch:
        """Return some rows, and behind them their corrections.

        A response that nothing scores is left out where a correction stands for it: one forward pass for both.
        """
        if self.corrections is None:
            return _micro_batch(self.rollouts, rows, self.scores, self.anchor, self.behaviour_logprobs)
        added = {row: self.corrections.rows_of(row) for row in rows}
        own = [row for row in rows if self.scores[row].positions or not added[row]]
        further = [number for row in rows for number in added[row]]
        corrections = self.corrections
        parts = []
        if own:
            parts.append(_micro_batch(self.rollouts, own, self.scores, self.anchor, self.behaviour_logprobs))
        if further:
            # Nobody drew a correction's tokens, and nothing asks how likely they were
            none = None if self.behaviour_logprobs is None else torch.zeros(corrections.rollouts.input_ids.shape)
            none = (
                None
                if none is None
                else none[:, corrections.rollouts.completion_start :].to(corrections.rollouts.input_ids.device)
            )
            parts.append(_micro_batch(corrections.rollouts, further, corrections.scores, corrections.anchor, none))
        place = {number: len(own) + at for at, number in enumerate(further)}
        pairs = tuple((place[a], place[b]) for a, b in corrections.pairs if a in place)
        return replace(_joined(parts), pairs=pairs)


def _micro_batch(
    rollouts: Rollouts,
    rows: Sequence[int],
    scores: Sequence[RowScores],
    anchor: Sequence[RowScores],
    behaviour: Tensor | None,
) -> MicroBatch:
    """Return some rows of a generation batch without the columns that none of them uses."""
    device = rollouts.input_ids.device
    chosen = tuple(scores[row] for row in rows)
    index = torch.tensor(list(rows)).to(device, non_blocking=True)
    ids, mask = (tensor.index_select(0, index) for tensor in (rollouts.input_ids, rollouts.attention_mask))
    spans = [one.span for one in chosen]
    if behaviour is not None:
        flat = behaviour.index_select(0, index).reshape(-1)
        behaviour = flat.index_select(0, scored_positions(chosen, behaviour.shape[1], device))
    return MicroBatch(
        *left_aligned(ids, mask, spans),
        chosen,
        tuple(rollouts.responses[row] for row in rows),
        tuple(rollouts.completion_start - span.first for span in spans),
        tuple(anchor[row] for row in rows) if anchor else (),
        behaviour,
    )


def _joined(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Put the rows of micro-batches after one another."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.input_ids.shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    behaviour = [part.behaviour_logprobs for part in parts]
    return MicroBatch(
        torch.cat([padded(part.input_ids) for part in parts]),
        torch.cat([padded(part.attention_mask) for part in parts]),
        tuple(one for part in parts for one in part.scores),
        tuple(one for part in parts for one in part.responses),
        tuple(at for part in parts for at in part.starts),
        # A preference asks the start about its own rows alone
        tuple(one for part in parts for one in part.anchor or [replace(row, signals={}) for row in part.scores])
        if any(part.anchor for part in parts)
        else (),
        None if behaviour[0] is None else torch.cat([b for b in behaviour if b is not None]),
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


class RunningMean:
    """A mean over the micro-batches of all ranks since the last log; what is added stays on its device until then."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def add(self, total: Tensor, count: int) -> None:
        """Count a micro-batch.

        Args:
            total: scalar, the sum of its values.
            count: how many they are.
        """
        total = total.detach().float()
        seen = torch.stack([total, torch.full_like(total, count)])
        self._seen = seen if self._seen is None else self._seen + seen

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> float | None:
        """Return the mean, None of nothing, and begin anew.

        Args:
            reduce: sums a tensor over all ranks; called on every rank.
            device: where a rank that saw nothing has its zeros.
        """
        total, count = reduce(torch.zeros(2, device=device) if self._seen is None else self._seen).tolist()
        self._seen = None
        return float(total / count) if count else None


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


class Watch(Protocol):
    """What looks on; :class:`~kd_plugin.monitor.watch.Monitor` is one."""

    @property
    def clock(self) -> Any:
        """Entered with a teacher's name around all that it does."""
        ...

    @property
    def values_are_read(self) -> bool:
        """Whether anything reads each teacher's divergence of the present batch."""
        ...

    def observe(self, responses: Sequence[Response]) -> None:
        """Look at the responses of a generation batch; a collective call."""
        ...

    def see(self, batch: MicroBatch, hidden: Tensor, head: OutputHead, tokens: Tensor, loss: MicroBatchLoss) -> None:
        """Look at a micro-batch, whose heads are gathered."""
        ...

    @property
    def counted(self) -> bool:
        """Whether anything was seen since the last log; the same on every rank."""
        ...

    def read_divergences(
        self, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, float], float | None]:
        """Return each teacher's divergence and tokens, and the mean loss; a collective call without ``reduce``."""
        ...

    def read(self) -> dict[str, float]:
        """Return what else was seen since the last log; a collective call."""
        ...
