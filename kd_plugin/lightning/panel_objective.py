"""What a student's forward pass computes against the panel's corrections."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_plugin.divergence import Divergence
from kd_plugin.lightning.writing import Rollouts
from kd_plugin.panel import Correction, TeacherPanel
from kd_plugin.panel.loss import Judgement, correction_loss
from kd_plugin.signals import OutputHead
from kd_plugin.zero.sharding import whole_heads


@dataclass(frozen=True)
class Corrected:
    """A micro-batch of what the student wrote, with the panel's corrections.

    Attributes:
        corrections: one a row.
        rollouts: the rows.
        step: optimizer step, for weights with a schedule.
    """

    corrections: tuple[Correction, ...]
    rollouts: Rollouts
    step: int


@dataclass(frozen=True)
class PanelFound:
    """The panel's loss of a micro-batch; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, in nats.
        entropy: (N,) nats, of the student's distribution.
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
    """

    panel: TeacherPanel
    divergence: Divergence
    temperature: float
    ce_weight: float

    @property
    def forms_own(self) -> bool:
        """Whether :meth:`loss` can form the labels' cross-entropy in the same pass: it does not."""
        return False

    def without_own(self) -> PanelObjective:
        """Return the same objective without the module's own loss."""
        return replace(self, ce_weight=0.0)

    def loss(self, hidden: Tensor, head: OutputHead, target: Corrected) -> PanelFound:
        """Return the summed divergence at the completions' tokens.

        Args:
            hidden: (B, L, H) last hidden states of the student.
            head: its output head, cut to the vocabulary.
            target: the corrections of the B rows.
        """
        hidden = hidden.to(head.weight.device)
        width, start = hidden.shape[1], target.rollouts.completion_start
        # The token in column c is predicted in column c - 1
        flat = [b * width + start + c - 1 for b, one in enumerate(target.corrections) for c in one.positions]
        positions = torch.tensor(flat, dtype=torch.int64).to(hidden.device, non_blocking=True)
        tokens = target.rollouts.input_ids.to(hidden.device).reshape(-1).index_select(0, positions + 1)
        with whole_heads(self.panel.teachers.values()):
            found = correction_loss(
                self.panel,
                target.corrections,
                hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions),
                head,
                tokens,
                divergence=self.divergence,
                temperature=self.temperature,
                step=target.step,
            )
        return PanelFound(found.loss_sum, found.entropy, found.judgements, len(flat))
