"""The reverse KL from the one token that the student sampled: its policy gradient, without full logits.

KL(q ‖ p) is the mean over the student's tokens y of log q(y) − log p(y), and its gradient is the mean of
(log q(y) − log p(y))·∇ log q(y): the term that differentiating the log-ratio itself would add has mean zero, and that
derivative alone (the "k1" estimate, differentiated) does not contain the teacher at all. So the value of this loss is
the log-ratio, and its gradient is the policy gradient, which is not the derivative of that value.

A teacher with another tokenizer gives one log-probability to several tokens, or several to one: those of a *chunk*. The
student's choice is then the whole chunk y, KL(q ‖ p) is the mean over chunks, and its gradient is the mean of
(log q(y) − log p(y))·Σ ∇ log q over the tokens of y. With one token a chunk it is the same.

``matching`` compares, in the place of that, how likely both models find each chunk: the divergence of two outcomes,
the chunk and anything else, raised to 1/τ (approximate likelihood matching, Minixhofer et al., arXiv 2503.20083).

Shape suffixes: N positions, R positions of a tile, V tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.across.folding import Folding
from kd_plugin.divergence.gradient import StudentGradient
from kd_plugin.divergence.projection import (
    Projector,
    Workspace,
    autocast_dtype,
    chunk_rows,
    needs_gradient,
    require_finite,
    require_hidden,
    scaled_once,
    statistics_dtype,
    without_unused,
)
from kd_plugin.divergence.projection import chunks as tiles
from kd_plugin.divergence.reference import from_logprobs
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import OutputHead
from kd_plugin.vocab import SharedTokens


@dataclass(frozen=True)
class SampledLoss:
    """What :func:`fused_sampled_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, Σ weights·(log q − log p) of the sampled tokens, in nats: an unbiased
            estimate of the reverse KL, which may be negative. Its gradient is the policy gradient. With ``matching``
            the divergence of the chunks' likelihoods, and its derivative.
        values: (N,) nats, each position's part of ``loss_sum`` before weighting; 0 where the weight is 0. Detached.
        logprobs: (N,) nats, the student's of the sampled tokens at the temperature, or of the outcomes that they stand
            for; 0 where the weight is 0. Detached.
        entropy: (N,) nats, of the student's distribution; 0 where the weight is 0. Detached.
    """

    loss_sum: Tensor
    values: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Matching:
    """How the likelihoods of chunks are compared.

    Attributes:
        divergence: of the two outcomes.
        tau: what both log-likelihoods are divided by, so that long chunks do not all look impossible. The divergence is
            multiplied by it.
    """

    divergence: Divergence
    tau: float = 1.0


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
    shared: SharedTokens | None = None,
    chunks: Sequence[int] | None = None,
    matching: Matching | None = None,
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
        shared: where the teacher has another vocabulary, what both share. A token that is not shared stands for the
            rest as one outcome, and its ``teacher_logprobs`` is the log of the teacher's mass there, a millionth where
            the teacher has no such token.
        chunks: how many positions each chunk has, one after another, N in all; those of one chunk have one weight.
            Their ``teacher_logprobs`` count by their sum. None for a chunk a position. Numbers of the host, so that
            no tile waits for the device.
        matching: compare the chunks' likelihoods in this way, in the place of the policy gradient.

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
    if chunks is not None and sum(chunks) != len(student_hidden):
        raise ConfigError(f"chunks have {sum(chunks)} positions in all; expected {len(student_hidden)}.")
    inputs = (student_hidden, student_head.weight, student_head.bias)
    plan = _SampledPlan(
        student_head, tokens, teacher_logprobs, weights, behaviour_logprobs, ratio_bounds, shared, chunks, matching,
        float(temperature), needs_gradient(*inputs), statistics_dtype(student_hidden),
        autocast_dtype(student_hidden.device), _rows,
    )  # fmt: skip
    loss_sum, values, logprobs, entropy = _SampledFunction.apply(*inputs, plan)
    if loss_sum.device.type == "cpu":
        require_finite(loss_sum, "The reverse_kl from sampled tokens")
    return SampledLoss(loss_sum, values, logprobs, entropy)


@dataclass(frozen=True)
class _SampledPlan:
    """The arguments of the loss that autograd does not look into."""

    student: OutputHead
    tokens: Tensor
    teacher_logprobs: Tensor
    weights: Tensor | None
    behaviour: Tensor | None
    ratio_bounds: tuple[float, float]
    shared: SharedTokens | None
    chunks: Sequence[int] | None
    matching: Matching | None
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
            loss, *details, ctx.gradients = _sampled_pass(hidden_NH, weight, bias, student, plan)
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        ctx.mark_non_differentiable(*details)
        return loss, *details

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)


def _sampled_pass(
    hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, student: OutputHead, plan: _SampledPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    count, device, statistics = hidden_NH.shape[0], hidden_NH.device, plan.statistics
    dtype, need_grad = plan.autocast or hidden_NH.dtype, any(plan.needs)
    rows = min(plan.rows or chunk_rows(student.weight.shape[0], device), max(count, 1))
    parts = (
        _whole_chunks(plan.chunks, rows) if plan.chunks is not None else [(part, None) for part in tiles(count, rows)]
    )
    rows = max([rows, *(part.stop - part.start for part, _ in parts)])
    workspace = Workspace(rows, student.weight.shape[0], device)
    project = Projector(student, "student", workspace, dtype, statistics, plan.temperature, keep_slope=need_grad)
    gradient = StudentGradient(hidden_NH, weight, bias, project, plan.needs, statistics)
    weights_N = torch.ones(count, dtype=statistics, device=device)
    if plan.weights is not None:
        weights_N = plan.weights.detach().to(device, statistics)
    outcomes = None
    if plan.shared is not None and plan.shared.student_has_rest:
        outcomes = _Outcomes(plan.shared, rows, device)
    used_N = weights_N != 0
    teacher_N = torch.where(used_N, plan.teacher_logprobs.detach().to(device, statistics), 0.0)
    values_N, logprobs_N, entropy_N = (torch.zeros_like(weights_N) for _ in range(3))
    for part, sizes in parts:
        hidden_RH = without_unused(hidden_NH.detach()[part].to(dtype), used_N[part].unsqueeze(-1))
        logq_RV = project(hidden_RH)
        logq_RV.sub_(logq_RV.logsumexp(-1, keepdim=True))
        ids_R = plan.tokens[part].to(device)
        drawn_R = logprob_R = logq_RV.gather(1, ids_R.unsqueeze(-1))[:, 0]
        if outcomes is not None:
            logprob_R = outcomes.of(logq_RV, ids_R)
        logprobs_N[part] = torch.where(used_N[part], logprob_R, 0.0)
        q_RV = torch.exp(logq_RV, out=workspace.get("q", logq_RV.shape[0], statistics))
        entropy_N[part] = torch.where(used_N[part], logq_RV.mul_(q_RV).sum(-1).neg_(), 0.0)
        chunks = _Chunks(sizes, device)
        values_N[part], slope_R = _compared(logprobs_N[part], teacher_N[part], chunks, plan.matching)
        if need_grad:
            factor_R = weights_N[part] * slope_R * project.multiplier
            if plan.behaviour is not None:
                behaviour_R = torch.where(used_N[part], plan.behaviour[part].to(device, statistics), drawn_R)
                factor_R = factor_R * chunks.sums(drawn_R - behaviour_R).exp().clamp(*plan.ratio_bounds)
            factor_R1 = torch.where(used_N[part], factor_R, 0.0).unsqueeze(-1)
            if outcomes is None:
                grad_RV = q_RV.mul_(-factor_R1).scatter_add_(1, ids_R.unsqueeze(-1), factor_R1)
            else:
                grad_RV = outcomes.gradient(factor_R1, q_RV)
            gradient.add(grad_RV, hidden_RH, part)
    return weights_N @ values_N, values_N, logprobs_N, entropy_N, gradient.take()


class _Chunks:
    """Sums over the chunks of a tile, given back to each of their positions."""

    def __init__(self, sizes: Sequence[int] | None, device: torch.device) -> None:
        self._number_R = None
        if sizes is not None:
            number_R = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
            self._number_R = number_R.to(device, non_blocking=True)

    def sums(self, values_R: Tensor) -> Tensor:
        if self._number_R is None:
            return values_R
        return torch.zeros_like(values_R).index_add_(0, self._number_R, values_R)[self._number_R]


def _compared(logq_R: Tensor, logp_R: Tensor, chunks: _Chunks, matching: Matching | None) -> tuple[Tensor, Tensor]:
    """Return each position's part of the value, and what its ∇ log q is multiplied by."""
    if matching is None:
        ratio_R = logq_R - logp_R
        return ratio_R, chunks.sums(ratio_R)
    with torch.enable_grad():
        leaf_R = (chunks.sums(logq_R) / matching.tau).detach().requires_grad_()
        logp_R = chunks.sums(logp_R) / matching.tau
        value_R = from_logprobs(_or_else(leaf_R), _or_else(logp_R), matching.divergence)
        (slope_R,) = torch.autograd.grad(value_R.sum(), leaf_R)
    share_R = matching.tau / chunks.sums(torch.ones_like(logq_R))
    return value_R.detach() * share_R, slope_R


def _or_else(logprob_R: Tensor) -> Tensor:
    """Return (R, 2) log-probabilities of an outcome and of anything else, which keeps a trace of probability."""
    kept_R = logprob_R.clamp(max=-1e-6)
    return torch.stack([kept_R, torch.log(-torch.expm1(kept_R))], -1)


def _whole_chunks(sizes: Sequence[int], rows: int) -> list[tuple[slice, Sequence[int] | None]]:
    """Cut positions into tiles of about ``rows``, never inside a chunk, each with the sizes of its chunks.

    A tile of a longer chunk is as long as that.
    """
    parts: list[tuple[slice, Sequence[int] | None]] = []
    start = stop = 0
    inside: list[int] = []
    for size in sizes:
        if stop + size - start > rows and inside:
            parts.append((slice(start, stop), inside))
            start, inside = stop, []
        stop += size
        inside.append(size)
    return [*parts, (slice(start, stop), inside)] if inside else parts


class _Outcomes:
    """The sampled tokens of a tile as outcomes: shared tokens, and the rest."""

    def __init__(self, shared: SharedTokens, rows: int, device: torch.device) -> None:
        self._folding = Folding(shared, shared.student_size, 0.0, device)
        self._workspace = Workspace(rows, self._folding.outcomes, device)

    def of(self, logq_RV: Tensor, ids_R: Tensor) -> Tensor:
        """Return (R,) nats of each token's outcome."""
        self._logq_RJ = self._folding.fold(logq_RV, self._workspace.get("logq", len(logq_RV), logq_RV.dtype))
        self._columns_R1 = self._folding.columns(ids_R).unsqueeze(-1)
        self._logq_RJ.sub_(self._logq_RJ.logsumexp(-1, keepdim=True))
        return self._logq_RJ.gather(1, self._columns_R1)[:, 0]

    def gradient(self, factor_R1: Tensor, out_RV: Tensor) -> Tensor:
        """Return factor·∇ log q(outcome) in the student's logits, in the memory of ``out_RV``."""
        grad_RJ = self._logq_RJ.exp_().mul_(-factor_R1).scatter_add_(1, self._columns_R1, factor_R1)
        return self._folding.unfold(grad_RJ, out_RV)
