"""Divergence from a panel of teachers without full logits, with the gradient formed in the same pass.

Each chunk of student hidden states is projected once, whatever the number of teachers. Logits exist for one chunk at
a time, and nothing is projected again in backward: the gradient with respect to hidden states and head is ready when
the loss is, and backward only multiplies it by the incoming scalar.

Shape suffixes: N positions of the batch, n positions of a group, R positions of a chunk, V tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.finite import require_finite
from kd_plugin.divergence.groups import PanelGroup, TeacherTerm, check_groups
from kd_plugin.divergence.panel_pass import Plan, panel_pass
from kd_plugin.divergence.projection import (
    autocast_dtype,
    needs_gradient,
    require_hidden,
    scaled_once,
    statistics_dtype,
)
from kd_plugin.divergence.shared import merged_by_head
from kd_plugin.divergence.spec import Divergence
from kd_plugin.signals import OutputHead

__all__ = ["PanelGroup", "PanelLoss", "TeacherTerm", "fused_panel_divergence"]


@dataclass(frozen=True)
class PanelLoss:
    """What :func:`fused_panel_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, in nats: the sum over positions of what the groups' combining says.
        entropy: (N,) nats, of the student's distribution at the temperature of the position's first teacher; 0 at
            positions of no group, or where every weight is 0. Detached.
        divergences: for each group, for each term, (n,) nats before weighting; 0 where the weight is 0. Without
            values, nothing for any group. Detached.
        weights: for each group, for each term, (n,) the weights that were used, those of ``confidence`` included.
            Empty as ``divergences`` is. Detached.
    """

    loss_sum: Tensor
    entropy: Tensor
    divergences: tuple[tuple[Tensor, ...], ...]
    weights: tuple[tuple[Tensor, ...], ...]


@torch.compiler.disable
def fused_panel_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    groups: Sequence[PanelGroup],
    divergence: Divergence,
    temperature: float = 1.0,
    *,
    values: bool = True,
    _rows: int | None = None,
) -> PanelLoss:
    """Σ over positions of the panel's divergence from the student, with its gradient, in one pass.

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
        values: False leaves out what only a log needs. The gradient is the same. Where teachers of a ``sum`` share
            one head and the divergence is ``reverse_kl``, they are projected once, all together (see ``shared``),
            and ``loss_sum`` is then a lower bound of the loss.

    Returns:
        PanelLoss.

    Raises:
        ConfigError: shapes, vocabulary sizes or the temperature do not fit.
        NonFiniteError: on CPU only, the loss is NaN or infinite. On an accelerator the host checks with
            ``require_finite`` when it reads the loss, because reading it here would make the device wait.
    """
    require_hidden(student_hidden, temperature)
    check_groups(student_hidden, groups)
    if not values:
        groups = [merged_by_head(group, divergence) for group in groups]
    tensors = (student_hidden, student_head.weight, student_head.bias)
    needs = needs_gradient(*tensors)
    plan = Plan(
        student_head,
        tuple(groups),
        divergence,
        float(temperature),
        needs,
        statistics_dtype(student_hidden),
        autocast_dtype(student_hidden.device),
        values,
        _rows,
    )
    loss_sum, entropy, *flat = _PanelFunction.apply(*tensors, plan)
    if loss_sum.device.type == "cpu":
        require_finite(loss_sum, f"The {divergence.name} of the panel")
    if not values:
        return PanelLoss(loss_sum, entropy, tuple(() for _ in groups), tuple(() for _ in groups))
    found = iter(flat)
    divergences, weights = (
        tuple(tuple(next(found) for _ in group.terms) for group in groups) for _ in ("divergences", "weights")
    )
    return PanelLoss(loss_sum, entropy, divergences, weights)


class _PanelFunction(torch.autograd.Function):
    """Forward forms loss and gradient together; backward scales."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            student = plan.student.real_rows()
            found = panel_pass(hidden_NH, weight, bias, student, plan)
        ctx.gradients = found.gradients
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        details = (found.entropy_N, *found.values, *found.weights) if plan.values else (found.entropy_N,)
        ctx.mark_non_differentiable(*details)
        return (found.loss, *details)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)
