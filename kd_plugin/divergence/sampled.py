"""The reverse KL from the one token that the student sampled: its policy gradient, without full logits.

KL(q ‖ p) is the mean over the student's tokens y of log q(y) − log p(y), and its gradient is the mean of
(log q(y) − log p(y))·∇ log q(y): the term that differentiating the log-ratio itself would add has mean zero, and that
derivative alone (the "k1" estimate, differentiated) does not contain the teacher at all. So the value of this loss is
the log-ratio, and its gradient is the policy gradient, which is not the derivative of that value.

Shape suffixes: N positions, R positions of a chunk, V tokens, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.projection import (
    Projector,
    StudentGradient,
    Workspace,
    autocast_dtype,
    chunk_rows,
    chunks,
    needs_gradient,
    require_finite,
    require_hidden,
    scaled_once,
    statistics_dtype,
    without_unused,
)
from kd_plugin.errors import ConfigError
from kd_plugin.signals import OutputHead


@dataclass(frozen=True)
class SampledLoss:
    """What :func:`fused_sampled_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, Σ weights·(log q − log p) of the sampled tokens, in nats: an unbiased
            estimate of the reverse KL, which may be negative. Its gradient is the policy gradient.
        logprobs: (N,) nats, the student's of the sampled tokens at the temperature; 0 where the weight is 0. Detached.
        entropy: (N,) nats, of the student's distribution; 0 where the weight is 0. Detached.
    """

    loss_sum: Tensor
    logprobs: Tensor
    entropy: Tensor


@torch.compiler.disable
def fused_sampled_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    tokens: Tensor,
    teacher_logprobs: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    behaviour_logprobs: Tensor | None = None,
    ratio_bounds: tuple[float, float] = (0.5, 2.0),
    _rows: int | None = None,
) -> SampledLoss:
    """Estimate Σ w·KL(student ‖ teacher) and its gradient from the sampled tokens, in one pass.

    Dtypes, gradients and backward are as in :func:`fused_panel_divergence`.

    Args:
        student_hidden: (N, H) last hidden states at the scored positions.
        student_head: the student's head, as autograd knows it.
        tokens: (N,) int64, drawn from the student's whole distribution at ``temperature``. Drawn from another (top-p,
            a dataset), the estimate is biased.
        teacher_logprobs: (N,) nats, the teacher's of these tokens at ``temperature``. For a weighted sum of teachers
            the weighted mean of theirs.
        temperature: divides the student's logits.
        weights: (N,) or None for one everywhere. A position of weight 0 adds nothing.
        behaviour_logprobs: (N,) nats of the tokens when and where they were drawn; None if that was this student.
            The gradient is multiplied by the ratio of q now to q then.
        ratio_bounds: between which that ratio is kept: the bias that they bring bounds the variance.

    Returns:
        SampledLoss.

    Raises:
        ConfigError: shapes or the temperature do not fit.
        NonFiniteError: on CPU only, the loss is NaN or infinite; see ``require_finite``.
    """
    require_hidden(student_hidden, temperature)
    given = {"tokens": tokens, "teacher_logprobs": teacher_logprobs, "weights": weights}
    for name, tensor in {**given, "behaviour_logprobs": behaviour_logprobs}.items():
        if tensor is not None and tensor.shape != (student_hidden.shape[0],):
            raise ConfigError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({student_hidden.shape[0]},), one a position."
            )
    inputs = (student_hidden, student_head.weight, student_head.bias)
    plan = _SampledPlan(
        student_head, tokens, teacher_logprobs, weights, behaviour_logprobs, ratio_bounds, float(temperature),
        needs_gradient(*inputs), statistics_dtype(student_hidden), autocast_dtype(student_hidden.device), _rows,
    )  # fmt: skip
    loss_sum, logprobs, entropy = _SampledFunction.apply(*inputs, plan)
    if loss_sum.device.type == "cpu":
        require_finite(loss_sum, "The reverse_kl from sampled tokens")
    return SampledLoss(loss_sum, logprobs, entropy)


@dataclass(frozen=True)
class _SampledPlan:
    """The arguments of the loss that autograd does not look into."""

    student: OutputHead
    tokens: Tensor
    teacher_logprobs: Tensor
    weights: Tensor | None
    behaviour: Tensor | None
    ratio_bounds: tuple[float, float]
    temperature: float
    needs: tuple[bool, bool, bool]
    statistics: torch.dtype
    autocast: torch.dtype | None
    rows: int | None


class _SampledFunction(torch.autograd.Function):
    """Forward forms value and gradient together; backward scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: _SampledPlan
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            student = plan.student.real_rows()
            loss, logprobs_N, entropy_N, ctx.gradients = _sampled_pass(hidden_NH, weight, bias, student, plan)
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        ctx.mark_non_differentiable(logprobs_N, entropy_N)
        return loss, logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)


def _sampled_pass(
    hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, student: OutputHead, plan: _SampledPlan
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    count, device, statistics = hidden_NH.shape[0], hidden_NH.device, plan.statistics
    dtype, need_grad = plan.autocast or hidden_NH.dtype, any(plan.needs)
    rows = min(plan.rows or chunk_rows(student.weight.shape[0], device), max(count, 1))
    workspace = Workspace(rows, student.weight.shape[0], device)
    project = Projector(student, "student", workspace, dtype, statistics, plan.temperature, keep_slope=need_grad)
    gradient = StudentGradient(hidden_NH, weight, bias, project, plan.needs, statistics)
    weights_N = torch.ones(count, dtype=statistics, device=device)
    if plan.weights is not None:
        weights_N = plan.weights.detach().to(device, statistics)
    used_N = weights_N != 0
    teacher_N = torch.where(used_N, plan.teacher_logprobs.detach().to(device, statistics), 0.0)
    logprobs_N, entropy_N = torch.zeros_like(weights_N), torch.zeros_like(weights_N)
    for part in chunks(count, rows):
        hidden_RH = without_unused(hidden_NH.detach()[part].to(dtype), used_N[part].unsqueeze(-1))
        logq_RV = project(hidden_RH)
        logq_RV.sub_(logq_RV.logsumexp(-1, keepdim=True))
        ids_R1 = plan.tokens[part].to(device).unsqueeze(-1)
        logprob_R = logq_RV.gather(1, ids_R1)[:, 0]
        logprobs_N[part] = torch.where(used_N[part], logprob_R, 0.0)
        q_RV = torch.exp(logq_RV, out=workspace.get("q", logq_RV.shape[0], statistics))
        entropy_N[part] = torch.where(used_N[part], logq_RV.mul_(q_RV).sum(-1).neg_(), 0.0)
        if need_grad:
            factor_R = weights_N[part] * (logprobs_N[part] - teacher_N[part]) * project.multiplier
            if plan.behaviour is not None:
                ratio_R = (logprobs_N[part] - plan.behaviour[part].to(device, statistics)).exp()
                factor_R = factor_R * ratio_R.clamp(*plan.ratio_bounds)
            factor_R1 = torch.where(used_N[part], factor_R, 0.0).unsqueeze(-1)
            gradient.add(q_RV.mul_(-factor_R1).scatter_add_(1, ids_R1, factor_R1), hidden_RH, part)
    return weights_N @ (logprobs_N - teacher_N), logprobs_N, entropy_N, gradient.take()
