"""Keeping a student near where it started: the weighted KL(student || start) beside the panel's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.panel.batches import RunningMean
from kd_plugin.panel.loss import panel_loss
from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.panel.scoring import RowScores, score_rows
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.in_process import tree_over_same_tensors, without_adapters
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.vocab import Vocabulary

_START = Assignment(("start",))
SHARDED_ANCHOR = (
    "anchor_weight keeps a whole copy of the student, and {} shard it. Name the start as a teacher of the panel "
    "instead: combine='weighted_kl', with the student's own path as one teacher."
)


class Anchor:
    """A panel of one teacher, the student's start, and what its divergence was since the last log.

    Args:
        start: see :func:`starting_student`.
        weight: of the divergence, in nats per token.
        temperature: divides the logits of both sides.
    """

    def __init__(self, start: LocalTeacher, weight: float, temperature: float) -> None:
        self.panel = TeacherPanel({"start": start})
        self.weight = weight
        self.temperature = temperature
        self._seen = {True: RunningMean(), False: RunningMean()}  # of training and of evaluation

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_start: int,
        positions: Sequence[Sequence[int]],
        rows_at_once: int,
    ) -> list[RowScores]:
        """Ask the start about a generation batch; see :func:`~kd_plugin.panel.scoring.score_rows`."""
        return score_rows(
            self.panel,
            [_START] * len(positions),
            input_ids,
            attention_mask,
            completion_start=completion_start,
            positions=positions,
            rows_at_once=rows_at_once,
        )

    def loss(
        self,
        scores: Sequence[RowScores],
        hidden: Tensor,
        head: OutputHead,
        tokens: Tensor,
        *,
        training: bool = True,
    ) -> Tensor:
        """Return the weighted KL(student || start) of a micro-batch, a sum in nats.

        Args:
            scores: what :meth:`score` said, one a row.
            hidden: (N, H) the student's, at the scored positions.
            head: the student's.
            tokens: (N,) that are scored.
            training: whether it is counted for training or for evaluation, until :meth:`read`.
        """
        found = panel_loss(
            self.panel,
            scores,
            hidden,
            head,
            tokens,
            divergence=Divergence("reverse_kl"),
            temperature=self.temperature,
        )
        parts = [one.divergence.sum() for one in found.by_teacher]
        total = torch.stack(parts or [hidden.detach().sum() * 0.0]).sum()
        self._seen[training].add(total, len(tokens))
        return self.weight * found.loss_sum

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device, *, training: bool = True) -> float:
        """Return the mean divergence in nats per token since the last call.

        Args:
            reduce: sums a tensor over all ranks; called on every rank.
            device: where a rank that saw nothing has its zeros.
            training: as in :meth:`loss`.
        """
        return self._seen[training].read(reduce, device) or 0.0


def starting_student(student: nn.Module, vocabulary: Vocabulary) -> LocalTeacher:
    """Return the student as it is now, frozen, as a teacher to anchor it to.

    A PEFT student costs nothing more: its start is its own base without the adapter. Another student is copied.

    Args:
        student: unwrapped, before the first step.
        vocabulary: the student's.

    Raises:
        ConfigError: the student is a PEFT model that trains a part of its base.
    """
    inner = getattr(student, "get_base_model", lambda: None)()
    if inner is None:
        start = copy.deepcopy(student)
        start.__dict__.pop("save_pretrained", None)  # a copy that is never saved needs no lineage
    else:
        start = without_adapters(tree_over_same_tensors(inner))
        trained = [name for name, parameter in start.named_parameters() if parameter.requires_grad]
        if trained:
            raise ConfigError(
                f"anchor_weight needs the student's start, but the student trains a part of its base ({trained[0]}), "
                "which then is gone. Train adapters alone, or set anchor_weight=0."
            )
    teacher = LocalTeacher(start, name="start")
    teacher.assume_vocabulary(vocabulary)
    return teacher
