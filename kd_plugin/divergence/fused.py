"""Divergence from a panel of teachers without full logits, with the gradient formed in the same pass.

Each chunk of student hidden states is projected once, whatever the number of teachers. Logits exist for one chunk at
a time, and nothing is projected again in backward: the gradient with respect to hidden states and head is ready when
the loss is, and backward only multiplies it by the incoming scalar.

Shape suffixes: N positions of the batch, n positions of a group, R positions of a chunk, V tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.finite import require_finite
from kd_plugin.divergence.projection import (
    Projector,
    StudentGradient,
    Workspace,
    autocast_dtype,
    chunk_rows,
    chunks,
    needs_gradient,
    require_hidden,
    require_matching_rows,
    scaled_once,
    statistics_dtype,
    whole_in_autograd,
    without_unused,
)
from kd_plugin.divergence.spec import Divergence
from kd_plugin.divergence.tiles import Tiles
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead


@dataclass(frozen=True)
class TeacherTerm:
    """One teacher's part in a group.

    Attributes:
        signal: hidden states (n, H) at the group's positions, and the teacher's head.
        weights: (n,) weight of this teacher at each position, or None for one everywhere. A position of weight 0
            is left out: it adds nothing, whatever its hidden states hold.
    """

    signal: HiddenSignal
    weights: Tensor | None = None


@dataclass(frozen=True)
class PanelGroup:
    """Positions that share the same teachers. Groups of one call are disjoint.

    A routed batch has one group a teacher; ``weighted_kl`` has one group with all teachers.

    Attributes:
        positions: (n,) int64 rows of the student's hidden states, or None for all N.
        terms: the teachers, in any order.
    """

    positions: Tensor | None
    terms: tuple[TeacherTerm, ...]


@dataclass(frozen=True)
class PanelLoss:
    """What :func:`fused_panel_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, Σ over positions and teachers of weight times divergence, in nats.
        entropy: (N,) nats, of the student's distribution at the temperature; 0 at positions of no group, or where
            every weight is 0. Detached.
        divergences: for each group, for each term, (n,) nats before weighting; 0 where the weight is 0. Detached.
    """

    loss_sum: Tensor
    entropy: Tensor
    divergences: tuple[tuple[Tensor, ...], ...]


@torch.compiler.disable
def fused_panel_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    groups: Sequence[PanelGroup],
    divergence: Divergence,
    temperature: float = 1.0,
    *,
    _rows: int | None = None,
) -> PanelLoss:
    """Σ over positions and teachers of w·D(teacher, student), with its gradient, in one pass.

    Matrix products run in autocast's dtype where autocast is on, else in the dtype of the hidden states; softmax
    statistics and gradient sums in float32 (float64 for float64 inputs). Gradients come back in the dtypes of the
    inputs. Only what requires a gradient gets one; without grad mode none is computed.

    Backward runs once: it scales the gradient in place. It cannot be differentiated again.

    Args:
        student_hidden: (N, H) last hidden states at the scored positions.
        student_head: the student's head, as autograd knows it (a parameter, a ZeRO-3 parameter, a DTensor).
        groups: disjoint groups of positions with their teachers; may be empty.
        divergence: which divergence.
        temperature: divides the logits of both sides; the loss is not multiplied by its square.

    Returns:
        PanelLoss.

    Raises:
        ConfigError: shapes, vocabulary sizes or the temperature do not fit.
        NonFiniteError: on CPU only, the loss is NaN or infinite. On an accelerator the host checks with
            ``require_finite`` when it reads the loss, because reading it here would make the device wait.
    """
    require_hidden(student_hidden, temperature)
    _check(student_hidden, groups)
    student = whole_in_autograd(student_head)
    tensors = (student_hidden, student.weight, student.bias)
    needs = needs_gradient(*tensors)
    plan = _Plan(
        student,
        tuple(groups),
        divergence,
        float(temperature),
        needs,
        statistics_dtype(student_hidden),
        autocast_dtype(student_hidden.device),
        _rows,
    )
    loss_sum, entropy, *flat = _PanelFunction.apply(*tensors, plan)
    if loss_sum.device.type == "cpu":
        require_finite(loss_sum, f"The {divergence.name} of the panel")
    values = iter(flat)
    return PanelLoss(loss_sum, entropy, tuple(tuple(next(values) for _ in group.terms) for group in groups))


@dataclass(frozen=True)
class _Plan:
    """The arguments of the loss that autograd does not look into."""

    student: OutputHead
    groups: tuple[PanelGroup, ...]
    divergence: Divergence
    temperature: float
    needs: tuple[bool, bool, bool]
    statistics: torch.dtype
    autocast: torch.dtype | None
    rows: int | None = None  # longest chunk; None chooses by vocabulary and device


class _PanelFunction(torch.autograd.Function):
    """Forward forms loss and gradient together; backward scales."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden_NH.device.type, enabled=False), plan.student.gathered() as student:
            loss, entropy_N, values, gradients = _panel_pass(hidden_NH, weight, bias, student, plan)
        ctx.gradients = gradients
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        ctx.mark_non_differentiable(entropy_N, *values)
        return (loss, entropy_N, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)


def _panel_pass(
    hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, student: OutputHead, plan: _Plan
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor | None, ...]]:
    """Loss, entropy, divergences and gradients; ``student`` is the gathered head, ``weight`` autograd's."""
    device, statistics, dtype = hidden_NH.device, plan.statistics, plan.autocast or hidden_NH.dtype
    vocab_size, need_grad = student.weight.shape[0], any(plan.needs)
    rows = plan.rows or chunk_rows(vocab_size, device)
    workspace = Workspace(min(rows, max(hidden_NH.shape[0], 1)), vocab_size, device)
    project = Projector(student, "student", workspace, dtype, statistics, plan.temperature, keep_slope=need_grad)
    gradient = StudentGradient(hidden_NH, weight, bias, project, plan.needs, statistics)
    tiles = Tiles(workspace, statistics, plan.divergence, project.multiplier, need_grad)
    entropy_N = torch.zeros(hidden_NH.shape[0], dtype=statistics, device=device)
    loss = torch.zeros((), dtype=statistics, device=device)
    values: list[Tensor] = []
    for group in plan.groups:
        count = hidden_NH.shape[0] if group.positions is None else group.positions.shape[0]
        weights = [_weights(term, count, statistics, device) for term in group.terms]
        found = [torch.zeros(count, dtype=statistics, device=device) for _ in group.terms]
        values += found
        with ExitStack() as open_heads:
            teachers = [
                _teacher(open_heads.enter_context(term.signal.head.gathered()), student, term, workspace, plan)
                for term in group.terms
            ]
            for part in chunks(count if teachers else 0, rows):
                where = part if group.positions is None else group.positions[part]
                used_R1 = torch.stack([weight[part] != 0 for weight in weights]).any(0).unsqueeze(-1)
                hidden_RH = without_unused(hidden_NH.detach()[where].to(dtype), used_R1)
                entropy_N[where] = tiles.start(project(hidden_RH), len(teachers)).where(used_R1.squeeze(-1), 0.0)
                for term, teacher, weight_n, value_n in zip(group.terms, teachers, weights, found, strict=True):
                    weight_R = weight_n[part]
                    used_R1 = (weight_R != 0).unsqueeze(-1)
                    teacher_RH = without_unused(term.signal.hidden[part].to(teacher.weight_VH.dtype), used_R1)
                    value_R = tiles.add_teacher(teacher(teacher_RH), weight_R)
                    value_n[part] = value_R.where(used_R1.squeeze(-1), 0.0)
                if need_grad:
                    gradient.add(tiles.gradient(), hidden_RH, where)
        for weight_n, value_n in zip(weights, found, strict=True):
            loss = loss + weight_n @ value_n
    return loss, entropy_N, values, gradient.take()


def _teacher(head: OutputHead, student: OutputHead, term: TeacherTerm, workspace: Workspace, plan: _Plan) -> Projector:
    require_matching_rows(student, head, "a teacher of the panel")
    hidden = term.signal.hidden
    return Projector(head, "teacher", workspace, plan.autocast or hidden.dtype, plan.statistics, plan.temperature)


def _weights(term: TeacherTerm, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if term.weights is None:
        return torch.ones(count, dtype=dtype, device=device)
    return term.weights.detach().to(device=device, dtype=dtype)


def _check(hidden_NH: Tensor, groups: Sequence[PanelGroup]) -> None:
    """Refuse shapes that do not fit, before anything is projected."""
    for g, group in enumerate(groups):
        if group.positions is not None and (group.positions.dim() != 1 or group.positions.dtype != torch.int64):
            raise ConfigError(
                f"Group {g}: positions have dtype {group.positions.dtype} and shape {tuple(group.positions.shape)}; "
                "expected int64 row numbers (n,). For a mask use mask.nonzero().squeeze(-1)."
            )
        count = hidden_NH.shape[0] if group.positions is None else group.positions.shape[0]
        for t, term in enumerate(group.terms):
            if term.signal.hidden.dim() != 2 or len(term.signal) != count:
                raise ConfigError(
                    f"Group {g}, teacher {t}: hidden states have shape {tuple(term.signal.hidden.shape)} for {count} "
                    "positions; expected one row a position of the group, in the group's order."
                )
            if term.weights is not None and term.weights.shape != (count,):
                raise ConfigError(
                    f"Group {g}, teacher {t}: weights have shape {tuple(term.weights.shape)}; expected ({count},)."
                )
