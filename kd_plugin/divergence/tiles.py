"""The elementwise part of the panel loss, on one chunk of logits at a time, in reused buffers.

For every divergence the gradient in the student's logits z is q·(a − ⟨q, a⟩), with a per teacher and summed over
teachers before it is applied, so that a further teacher costs one projection and a few passes:

    reverse_kl   a = log q − log p
    jsd          a = (1−β)·(log q − log m)          m = β·p + (1−β)·q
    skew_kl      a = −(1−α)·p/m                     m = α·p + (1−α)·q
    forward_kl   the limit a = −p/q, where the product is formed directly: Σ w·q − Σ w·p

Values are sums of p or q times differences of log-probabilities, never differences of two entropies, so that equal
distributions give 0 and nearly equal ones keep their digits.

Shape suffixes: R positions of a chunk, V tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_plugin.divergence.projection import Workspace
from kd_plugin.divergence.spec import Divergence


class Tiles:
    """Buffers and state of one chunk: the student's distribution, and a summed over the teachers so far.

    Call :meth:`start`; for each teacher :meth:`take` and :meth:`add`; then :meth:`gradient`. Teachers that are
    compared at another temperature follow after :meth:`settle` and a further :meth:`start`.

    Args:
        workspace: where the buffers live.
        dtype: of all buffers.
        need_grad: whether :meth:`gradient` will be called.
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype, need_grad: bool) -> None:
        self._workspace, self._dtype, self._need_grad = workspace, dtype, need_grad
        self._finished_RV: Tensor | None = None  # gradient of the teachers at earlier temperatures

    def start(self, logits_RV: Tensor, multiplier: float, teachers: int) -> Tensor:
        """Begin a chunk, or go on with it at another temperature.

        Args:
            logits_RV: the student's logits over the temperature; its memory is taken over.
            multiplier: factor of the gradient (logit scale over temperature).
            teachers: how many will be added until the next start.

        Returns:
            (R,) entropy in nats.
        """
        self._rows, self._teachers, self._multiplier = logits_RV.shape[0], teachers, multiplier
        self._logq_RV = torch.log_softmax(logits_RV, -1, out=self._buffer("logq"))
        self._q_RV = torch.exp(self._logq_RV, out=logits_RV)
        self._a_RV: Tensor | None = None  # Σ w·a
        self._p_sum_RV: Tensor | None = None  # Σ w·p of the forward KL
        self._factor_R1: Tensor | float = 0.0  # Σ w of the forward KL, less ⟨q, Σ w·a⟩ of the others
        return torch.mul(self._q_RV, self._logq_RV, out=self._buffer("logp")).sum(-1).neg_()

    def settle(self) -> None:
        """Put the gradient so far aside, before the memory of the student's logits is written again."""
        if self._need_grad:
            gradient_RV = self._fold()
            if self._finished_RV is None:
                self._finished_RV = self._buffer("finished").copy_(gradient_RV)

    def take(self, logits_RV: Tensor) -> Tensor:
        """Take in a teacher's logits (R, V), whose memory is taken over.

        Returns:
            (R, V) its log-probabilities; the next call overwrites them.
        """
        self._logp_RV = torch.log_softmax(logits_RV, -1, out=self._buffer("logp"))
        self._spare_RV, self._spare_is_p = logits_RV, False
        return self._logp_RV

    def teacher_entropy(self) -> Tensor:
        """(R,) entropy in nats of the teacher that was taken in last."""
        return torch.mul(self._probs(), self._logp_RV, out=self._buffer("scratch")).sum(-1).neg_()

    def value(self, divergence: Divergence) -> Tensor:
        """(R,) divergence in nats of the teacher that was taken in last, which stays as it is."""
        gap_RV = torch.sub(self._logp_RV, self._logq_RV, out=self._buffer("gap"))
        return self._compare(gap_RV, divergence, None)

    def add(self, weight_R: Tensor, divergence: Divergence) -> Tensor:
        """Compare with the teacher that was taken in last, and use it up.

        Args:
            weight_R: its weight at each position.
            divergence: which divergence.

        Returns:
            (R,) divergence in nats, before weighting.
        """
        weight_R = weight_R * self._multiplier
        if divergence.name != "reverse_kl":
            self._probs()  # before its logarithm is used up
        gap_RV = self._logp_RV.sub_(self._logq_RV)  # log p − log q
        return self._compare(gap_RV, divergence, weight_R if self._need_grad else None)

    def _compare(self, gap_RV: Tensor, divergence: Divergence, weight_R: Tensor | None) -> Tensor:
        """Value of one divergence; its gradient is added where there is a weight. Overwrites the gap."""
        name = "forward_kl" if divergence.name == "skew_kl" and divergence.alpha == 0.0 else divergence.name
        share = divergence.beta if name == "jsd" else divergence.alpha
        match name:
            case "forward_kl":
                p_RV = self._probs()
                value_R = gap_RV.mul_(p_RV).sum(-1)
                self._add_teacher_mass(p_RV, weight_R)
            case "reverse_kl":
                value_R = torch.mul(self._q_RV, gap_RV, out=self._spare()).sum(-1).neg_()
                self._add_slope(gap_RV, weight_R, -1.0, value_R)
            case "jsd":
                rise_RV = self._log_mixture_over_q(gap_RV, share)
                value_R = gap_RV.sub_(rise_RV).mul_(self._probs()).sum(-1) * share
                student_R = torch.mul(self._q_RV, rise_RV, out=self._spare()).sum(-1) * (share - 1.0)
                value_R = value_R + student_R
                self._add_slope(rise_RV, weight_R, share - 1.0, student_R)
            case _:
                ratio_RV = gap_RV.sub_(self._log_mixture_over_q(gap_RV, share))
                p_RV = self._probs()
                value_R = torch.mul(p_RV, ratio_RV, out=self._spare()).sum(-1)
                if weight_R is not None:
                    slope_R = torch.mul(self._q_RV, ratio_RV.exp_(), out=self._spare()).sum(-1) * (share - 1.0)
                    self._add_slope(ratio_RV, weight_R, share - 1.0, slope_R)
        return value_R

    def rescale(self, factor_R: Tensor) -> None:
        """Multiply the weights of all teachers so far."""
        if not self._need_grad:
            return
        factor_R1 = factor_R.unsqueeze(-1)
        for total_RV in (self._a_RV, self._p_sum_RV, self._finished_RV):
            if total_RV is not None:
                total_RV.mul_(factor_R1)
        self._factor_R1 = self._factor_R1 * factor_R1

    def gradient(self) -> Tensor:
        """(R, V) gradient of Σ w·D in the student's projection; ends the chunk and overwrites its buffers."""
        gradient_RV, self._finished_RV = self._fold(), None
        return gradient_RV

    def _fold(self) -> Tensor:
        if self._a_RV is None:
            assert self._p_sum_RV is not None
            total_RV = self._q_RV.mul_(self._factor_R1).sub_(self._p_sum_RV)
        else:
            total_RV = self._a_RV.add_(self._factor_R1).mul_(self._q_RV)
            if self._p_sum_RV is not None:
                total_RV.sub_(self._p_sum_RV)
        return total_RV if self._finished_RV is None else self._finished_RV.add_(total_RV)

    def _probs(self) -> Tensor:
        """(R, V) probabilities of the teacher that was taken in last; while its log-probabilities are whole."""
        if not self._spare_is_p:
            torch.exp(self._logp_RV, out=self._spare_RV)
            self._spare_is_p = True
        return self._spare_RV

    def _spare(self) -> Tensor:
        """(R, V) memory to write to, where the teacher's probabilities may have been."""
        self._spare_is_p = False
        return self._spare_RV

    def _add_teacher_mass(self, p_RV: Tensor, weight_R: Tensor | None) -> None:
        if weight_R is None:
            return
        self._factor_R1 = self._factor_R1 + weight_R.unsqueeze(-1)
        self._p_sum_RV = self._accumulated(self._p_sum_RV, p_RV, weight_R, "p_sum")

    def _add_slope(self, a_RV: Tensor, weight_R: Tensor | None, sign: float, mean_R: Tensor) -> None:
        """Add ``sign · w · a`` to the total, and take ``w · ⟨q, a⟩`` from the factor."""
        if weight_R is None:
            return
        self._factor_R1 = self._factor_R1 - (weight_R * mean_R).unsqueeze(-1)
        self._a_RV = self._accumulated(self._a_RV, a_RV, weight_R * sign, "a_sum")

    def _accumulated(self, total_RV: Tensor | None, part_RV: Tensor, weight_R: Tensor, name: str) -> Tensor:
        weight_R1 = weight_R.unsqueeze(-1)
        if total_RV is not None:
            return total_RV.addcmul_(part_RV, weight_R1)
        if self._teachers == 1:
            return part_RV.mul_(weight_R1)
        return torch.mul(part_RV, weight_R1, out=self._buffer(name))

    def _log_mixture_over_q(self, gap_RV: Tensor, share: float) -> Tensor:
        """log(share·p + (1−share)·q) − log q, from log p − log q."""
        rest = torch.tensor(math.log1p(-share), dtype=self._dtype, device=gap_RV.device)
        shifted_RV = torch.add(gap_RV, math.log(share), out=self._buffer("scratch"))
        return torch.logaddexp(shifted_RV, rest, out=shifted_RV)

    def _buffer(self, name: str) -> Tensor:
        return self._workspace.get(name, self._rows, self._dtype)
