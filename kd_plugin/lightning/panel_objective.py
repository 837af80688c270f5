"""What a student's forward pass computes against the panel's corrections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.objective import OfflineObjective
from kd_plugin.lightning.watching import PanelWatch
from kd_plugin.lightning.writing import Rollouts
from kd_plugin.panel import Correction, TeacherPanel
from kd_plugin.panel.anchor import Anchor
from kd_plugin.panel.loss import Judgement, correction_loss
from kd_plugin.panel.warmup import WarmupBatch, warmup_loss
from kd_plugin.rollouts.responses import Response
from kd_plugin.sharding.gathering import whole_heads
from kd_plugin.signals import OutputHead


@dataclass(frozen=True)
class Corrected:
    """A micro-batch of what the student wrote, with the panel's corrections.

    Attributes:
        corrections: one a row.
        rollouts: the rows.
        written: likewise, for people to read.
        step: optimizer step, for weights with a schedule.
        start: what the student's start said, one a row; empty where there is no anchor.
        watched: whether this is training, which is watched, and not validation.
    """

    corrections: tuple[Correction, ...]
    rollouts: Rollouts
    written: tuple[Response, ...]
    step: int
    start: tuple[Correction, ...] = ()
    watched: bool = True


@dataclass(frozen=True)
class PanelFound:
    """The panel's loss of a micro-batch; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, in nats.
        entropy: nats, of the student's distribution; (N,), or their sum.
        judgements: one a teacher and group of positions.
        tokens: N.
    """

    loss_sum: Tensor
    entropy: Tensor
    judgements: tuple[Judgement, ...]
    tokens: int

    def own_mean(self) -> Tensor:
        """Return the mean divergence, what a step sees as the model's loss where no logits are formed; no graph."""
        return self.loss_sum.detach() / max(self.tokens, 1)


@dataclass(frozen=True)
class PanelObjective:
    """The divergence from a panel, see :func:`kd_plugin.panel.loss.correction_loss`.

    Attributes:
        panel: the teachers.
        divergence: for teachers without one of their own.
        temperature: divides the logits of both sides.
        ce_weight: weight of the module's own loss.
        watch: is shown each micro-batch of training.
        anchor: the student's start, whose weighted divergence is added.
        warmup: what is minimised on cached rows.
    """

    panel: TeacherPanel
    divergence: Divergence
    temperature: float
    ce_weight: float
    watch: PanelWatch | None = None
    anchor: Anchor | None = None
    warmup: OfflineObjective | None = None

    @property
    def forms_own(self) -> bool:
        """Whether :meth:`loss` can form the labels' cross-entropy in the same pass: it does not."""
        return False

    def without_own(self) -> PanelObjective:
        """Return the same objective without the module's own loss."""
        return replace(self, ce_weight=0.0)

    def loss(self, hidden: Tensor, head: OutputHead, target: Any) -> PanelFound:
        """Return the summed divergence at the completions' tokens.

        Args:
            hidden: (B, L, H) last hidden states of the student.
            head: its output head, cut to the vocabulary.
            target: a :class:`Corrected` or, during the warm-up, a
                :class:`~kd_plugin.panel.warmup.WarmupBatch` of B rows.
        """
        hidden = hidden.to(head.weight.device)
        if isinstance(target, WarmupBatch):
            assert self.warmup is not None
            loss_sum, entropy, count = warmup_loss(self.warmup, hidden, head, target.targets)
            return PanelFound(loss_sum, entropy, (), count)
        width, start = hidden.shape[1], target.rollouts.completion_start
        # The token in column c is predicted in column c - 1
        flat = [b * width + start + c - 1 for b, one in enumerate(target.corrections) for c in one.positions]
        positions = torch.tensor(flat, dtype=torch.int64).to(hidden.device, non_blocking=True)
        ids = target.rollouts.input_ids.to(hidden.device)
        tokens = ids.reshape(-1).index_select(0, positions + 1)
        scored = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        watch = self.watch if target.watched else None
        with whole_heads(self.panel.teachers.values()):
            found = correction_loss(
                self.panel,
                target.corrections,
                scored,
                head,
                tokens,
                divergence=self.divergence,
                temperature=self.temperature,
                step=target.step,
                values=watch is None or watch.values_are_read,
            )
            if watch is not None:
                prompts = ids[:, :start], target.rollouts.attention_mask[:, :start]
                watch.see(target.corrections, prompts, target.written, scored, head, tokens, found)
        total = found.loss_sum
        if watch is not None and self.anchor is not None:
            total = total + self.anchor.loss(target.start, scored, head, tokens)
        return PanelFound(total, found.entropy, found.judgements, len(flat))
