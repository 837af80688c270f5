"""Divergence from the few tokens of a teacher that a cache or a server kept, with the gradient in the same pass.

Every form of it sees the vocabulary as the K listed tokens and the rest. Its gradient in the student's logits is one
number for each listed token and, for the rest, one factor of the student's own probability. So a chunk needs one
exponential of its logits, as plain cross-entropy does.

Shape suffixes: N positions of the batch, R positions of a chunk, K listed tokens, J = K + 1, V tokens, H width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.gradient import StudentGradient
from kd_plugin.divergence.listed import CoarseTarget, Tail, check_tail, listed_divergence
from kd_plugin.divergence.projection import (
    Projector,
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
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError, VocabularyError
from kd_plugin.signals import OutputHead, SparseSignal

_NO_LABEL = -100


@dataclass(frozen=True)
class SparseLoss:
    """What :func:`fused_sparse_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, Σ weights·kd_weight·D + Σ ce_weight·NLL, in nats.
        kd: (N,) divergence in nats before weighting; 0 where the weight is 0. Detached.
        nll: (N,) negative log-likelihood of the labels in nats, at temperature 1; 0 where the label is -100. None
            without labels. Detached.
        entropy: (N,) nats, of the student's distribution at ``temperature``; 0 at positions that have neither a
            weight nor a label. Detached.
        is_top1: (N,) bool, whether no token is more likely than the label; False where it is -100. None without
            labels. Detached.
    """

    loss_sum: Tensor
    kd: Tensor
    nll: Tensor | None
    entropy: Tensor
    is_top1: Tensor | None

    def own_mean(self) -> Tensor | None:
        """Return the mean cross-entropy of the labels in nats, as a model of its own computes it; no graph."""
        return None if self.nll is None else self.nll.sum() / (self.nll != 0).sum().clamp(min=1)


@torch.compiler.disable
def fused_sparse_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    target: SparseSignal,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    _rows: int | None = None,
) -> SparseLoss:
    """Σ of w·D(target, student), and of cross-entropy with labels, with their gradient, in one pass.

    Dtypes, gradients and backward are as in :func:`fused_panel_divergence`.

    Args:
        student_hidden: (N, H) last hidden states at the scored positions.
        student_head: the student's head, as autograd knows it.
        target: N rows of listed tokens, each token at most once a row. Sampled targets (with ``draws``) weigh
            tokens by draws / Σ draws, whose gradient is unbiased for the forward KL.
        divergence: which divergence; sampled targets and tails other than ``bucket`` take ``forward_kl`` only.
        temperature: divides the student's logits in D and in the entropy. The target's log-probabilities are taken
            as they are: it must be the temperature that they were captured at.
        tail: what becomes of tokens not listed. ``bucket`` compares their total mass on both sides as one outcome;
            ``keep`` leaves them out of the sum; ``renormalise`` scales the listed mass to one.
        weights: (N,) or None for one everywhere. A position of weight 0 adds nothing, whatever its target holds.
        labels: (N,) int64 next tokens, -100 for none; or None.
        kd_weight: factor of the divergence.
        ce_weight: factor of the labels' negative log-likelihood, which ``weights`` do not touch.

    Returns:
        SparseLoss.

    Raises:
        ConfigError: shapes do not fit, or tail, divergence and kind of target do not go together.
        VocabularyError: on CPU only, a target or label id lies outside the student's vocabulary.
        NonFiniteError: on CPU only, the loss is NaN or infinite; see ``require_finite``.
    """
    require_hidden(student_hidden, temperature)
    check_tail(tail, divergence, sampled=target.draws is not None)
    _check(student_hidden, student_head, target, weights, labels)
    tensors = (student_hidden, student_head.weight, student_head.bias)
    plan = _SparsePlan(
        student_head, target, divergence, float(temperature), tail, weights, labels, kd_weight, ce_weight,
        needs_gradient(*tensors), statistics_dtype(student_hidden), autocast_dtype(student_hidden.device), _rows,
    )  # fmt: skip
    loss_sum, kd, entropy, nll, is_top1 = _SparseFunction.apply(*tensors, plan)
    if loss_sum.device.type == "cpu":
        require_finite(loss_sum, f"The {divergence.name} against cached targets")
    return SparseLoss(loss_sum, kd, nll, entropy, is_top1)


@dataclass(frozen=True)
class _SparsePlan:
    """The arguments of the loss that autograd does not look into."""

    student: OutputHead
    target: SparseSignal
    divergence: Divergence
    temperature: float
    tail: Tail
    weights: Tensor | None
    labels: Tensor | None
    kd_weight: float
    ce_weight: float
    needs: tuple[bool, bool, bool]
    statistics: torch.dtype
    autocast: torch.dtype | None
    rows: int | None


class _SparseFunction(torch.autograd.Function):
    """Forward forms loss and gradient together; backward scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: _SparsePlan
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            student = plan.student.real_rows()
            found, ctx.gradients = _SparsePass(hidden_NH, weight, bias, student, plan).run()
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        loss = (found.kd * found.weights).sum() * plan.kd_weight
        if found.nll is not None and plan.ce_weight != 0.0:
            loss = loss + found.nll.sum() * plan.ce_weight
        outputs = (found.kd, found.entropy, found.nll, found.is_top1)
        ctx.mark_non_differentiable(*(t for t in outputs if t is not None))
        return (loss, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)


@dataclass(frozen=True)
class _Found:
    """Per-position results, filled chunk by chunk; (N,) each."""

    weights: Tensor
    kd: Tensor
    entropy: Tensor
    nll: Tensor | None
    is_top1: Tensor | None


class _SparsePass:
    """One walk over the positions; buffers for one chunk."""

    def __init__(self, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, student: OutputHead, plan: _SparsePlan):
        count, device, statistics = hidden_NH.shape[0], hidden_NH.device, plan.statistics
        self.plan, self.hidden_NH, self.need_grad = plan, hidden_NH.detach(), any(plan.needs)
        self.dtype = plan.autocast or hidden_NH.dtype
        self.rows = min(plan.rows or chunk_rows(student.weight.shape[0], device), max(count, 1))
        self.workspace = Workspace(self.rows, student.weight.shape[0], device)
        self.project = Projector(
            student, "student", self.workspace, self.dtype, statistics, 1.0, keep_slope=self.need_grad
        )
        self.gradient = StudentGradient(hidden_NH, weight, bias, self.project, plan.needs, statistics)
        self.listed = CoarseTarget.from_signal(plan.target, statistics)

        def zeros(dtype: torch.dtype = statistics) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        has_labels = plan.labels is not None
        weights = zeros() + 1 if plan.weights is None else plan.weights.detach().to(device, statistics)
        self.found = _Found(
            weights, zeros(), zeros(), zeros() if has_labels else None, zeros(torch.bool) if has_labels else None
        )

    def run(self) -> tuple[_Found, tuple[Tensor | None, ...]]:
        for part in chunks(self.hidden_NH.shape[0], self.rows):
            used_R = self.found.weights[part] != 0
            if self.plan.labels is not None:
                used_R = used_R | (self.plan.labels[part] != _NO_LABEL)
            hidden_RH = without_unused(self.hidden_NH[part].to(self.dtype), used_R.unsqueeze(-1))
            grad_RV = self._chunk(self.project(hidden_RH), part, used_R)
            if self.need_grad:
                self.gradient.add(grad_RV, hidden_RH, part)
        return self.found, self.gradient.take()

    def _chunk(self, logits_RV: Tensor, part: slice, used_R: Tensor) -> Tensor:
        """Fill the results of one chunk; return its gradient in the projection's logits, (R, V)."""
        plan, found, target = self.plan, self.found, self.listed[part]
        hard = None if plan.labels is None else _HardLabels(logits_RV, plan.labels[part])
        separate_RV = None
        if plan.temperature != 1.0:
            if hard is not None:
                lse_R1 = logits_RV.logsumexp(-1, keepdim=True)
                self._store_labels(hard, logits_RV.amax(-1, keepdim=True), lse_R1, part)
                if plan.ce_weight != 0.0 and self.need_grad:
                    separate_RV = hard.gradient(logits_RV.sub(lse_R1).exp_(), plan.ce_weight)
            logits_RV.div_(plan.temperature)

        listed_RK = logits_RV.gather(1, target.ids_NK)
        logits_RV.scatter_(1, target.ids_NK, torch.where(target.any_N1, -math.inf, listed_RK))
        listed_RK = torch.where(target.logp_NK == -math.inf, -math.inf, listed_RK)
        top_R1 = logits_RV.amax(-1, keepdim=True)
        shift_R1 = torch.where(top_R1 == -math.inf, 0.0, top_R1)  # everything is listed, and the rest is empty
        rest_RV = torch.exp(
            logits_RV.sub_(shift_R1), out=self.workspace.get("rest", logits_RV.shape[0], logits_RV.dtype)
        )
        mass_R1 = rest_RV.sum(-1, keepdim=True)
        coarse_RJ = torch.cat([listed_RK, mass_R1.log() + shift_R1], -1)
        lse_R1 = coarse_RJ.logsumexp(-1, keepdim=True)
        logq_RJ = coarse_RJ - lse_R1
        q_RJ = logq_RJ.exp()

        # Σ q·log q of the rest; a listed token's 0·(-inf) is made 0·0 first
        logits_RV.scatter_(
            1, target.ids_NK, target.spread(torch.zeros_like(listed_RK), logits_RV.gather(1, target.ids_NK))
        )
        rest_share_R1 = (shift_R1 - lse_R1).exp()
        inner_R = torch.mul(logits_RV, rest_RV, out=logits_RV).sum(-1)
        known_RK = torch.where(listed_RK == -math.inf, 0.0, q_RJ[:, :-1] * logq_RJ[:, :-1])
        entropy_R = -(known_RK.sum(-1) + (rest_share_R1 * (inner_R[:, None] + mass_R1 * (shift_R1 - lse_R1)))[:, 0])
        found.entropy[part] = entropy_R.where(used_R, 0.0)

        value_R, slope_RJ = listed_divergence(target, logq_RJ, plan.divergence, plan.tail, self.need_grad)
        weight_R1 = found.weights[part].unsqueeze(-1)
        found.kd[part] = value_R.where(weight_R1[:, 0] != 0, 0.0)
        if hard is not None and plan.temperature == 1.0:
            self._store_labels(hard, torch.maximum(top_R1, listed_RK.amax(-1, keepdim=True)), lse_R1, part)
        if slope_RJ is None:
            return rest_RV
        scale_R1 = weight_R1 * (plan.kd_weight / plan.temperature)
        slope_RJ = torch.where(weight_R1 != 0, slope_RJ * scale_R1, 0.0)
        grad_RJ = slope_RJ - q_RJ * slope_RJ.sum(-1, keepdim=True)
        factor_R1 = torch.where(mass_R1 == 0, 0.0, grad_RJ[:, -1:] / mass_R1)
        grad_RK = grad_RJ[:, :-1]
        joint = hard if plan.ce_weight != 0.0 and plan.temperature == 1.0 else None
        if joint is not None:
            present_R1 = joint.present_R1 * plan.ce_weight
            factor_R1 = factor_R1 + present_R1 * rest_share_R1
            grad_RK = grad_RK + present_R1 * q_RJ[:, :-1]
        rest_RV.mul_(factor_R1)
        rest_RV.scatter_(1, target.ids_NK, target.spread(grad_RK, rest_RV.gather(1, target.ids_NK)))
        if joint is not None:
            rest_RV.scatter_add_(1, joint.ids_R1, -present_R1)
        if separate_RV is not None:
            rest_RV.add_(separate_RV)
        return rest_RV if self.project.multiplier == 1.0 else rest_RV.mul_(self.project.multiplier)

    def _store_labels(self, hard: _HardLabels, top_R1: Tensor, lse_R1: Tensor, part: slice) -> None:
        assert self.found.nll is not None and self.found.is_top1 is not None
        present_R1 = hard.present_R1 != 0
        self.found.nll[part] = torch.where(present_R1, lse_R1 - hard.logit_R1, 0.0)[:, 0]
        self.found.is_top1[part] = (present_R1 & (hard.logit_R1 >= top_R1))[:, 0]


class _HardLabels:
    """The labels of a chunk and their logits, read before the logits are overwritten."""

    def __init__(self, logits_RV: Tensor, labels_R: Tensor) -> None:
        labels_R1 = labels_R.unsqueeze(-1)
        here_R1 = labels_R1 != _NO_LABEL
        self.present_R1 = here_R1.to(logits_RV.dtype)
        self.ids_R1 = torch.where(here_R1, labels_R1, 0)
        self.logit_R1 = logits_RV.gather(1, self.ids_R1)

    def gradient(self, q_RV: Tensor, weight: float) -> Tensor:
        """Overwrite probabilities with the gradient of the weighted negative log-likelihood."""
        present_R1 = self.present_R1 * weight
        return q_RV.mul_(present_R1).scatter_add_(1, self.ids_R1, -present_R1)


def _check(
    hidden_NH: Tensor, head: OutputHead, target: SparseSignal, weights: Tensor | None, labels: Tensor | None
) -> None:
    """Refuse shapes that do not fit, before anything is projected."""
    count = hidden_NH.shape[0]
    if target.ids.dim() != 2 or target.ids.shape != target.logprobs.shape or len(target) != count:
        raise ConfigError(
            f"The target has ids {tuple(target.ids.shape)} and logprobs {tuple(target.logprobs.shape)} for {count} "
            "positions; expected (positions, listed tokens) for both, one row a position."
        )
    for name, tensor in (("target.tail_logmass", target.tail_logmass), ("weights", weights), ("labels", labels)):
        if tensor is not None and tensor.shape != (count,):
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; expected ({count},), one value a position.")
    if hidden_NH.device.type != "cpu":
        return  # reading ids here would make the device wait; its own gather refuses ids out of range
    vocab_size = head.vocab_size if head.vocab_size is not None else head.weight.shape[0]
    for name, ids in (("target", target.ids.where(target.logprobs != -math.inf, 0)), ("label", labels)):
        if ids is not None and ids.numel() and int(ids.max()) >= vocab_size:
            raise VocabularyError(
                f"A {name} id is {int(ids.max())}, but the student's vocabulary ends at {vocab_size - 1}. The targets "
                "were made with another tokenizer: capture them again with the student's."
            )
