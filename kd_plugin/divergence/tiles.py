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

    Call :meth:`start`, then :meth:`add_teacher` for each teacher, then :meth:`gradient`.

    Args:
        workspace: where the buffers live.
        dtype: of all buffers.
        divergence: which divergence.
        multiplier: factor of the gradient (logit scale over temperature).
        need_grad: whether :meth:`gradient` will be called.
    """

    def __init__(
        self,
        workspace: Workspace,
        dtype: torch.dtype,
        divergence: Divergence,
        multiplier: float,
        need_grad: bool,
    ) -> None:
        self._workspace, self._dtype = workspace, dtype
        self._name = "forward_kl" if divergence.name == "skew_kl" and divergence.alpha == 0.0 else divergence.name
        self._share = divergence.beta if self._name == "jsd" else divergence.alpha
        self._multiplier, self._need_grad = multiplier, need_grad

    def start(self, logits_RV: Tensor, teachers: int) -> Tensor:
        """Begin a chunk; ``logits_RV`` becomes the student's log-probabilities in place.

        Returns:
            (R,) entropy in nats.
        """
        self._rows, self._teachers = logits_RV.shape[0], teachers
        self._logq_RV, self._q_RV = logits_RV, self._buffer("q")
        normalise_(logits_RV, self._q_RV)
        self._total_RV: Tensor | None = None
        self._factor_R1: Tensor | float = 0.0  # Σ w for the forward KL, ⟨q, a⟩ for the others
        return torch.mul(self._q_RV, self._logq_RV, out=self._buffer("p")).sum(-1).neg_()

    def add_teacher(self, logits_RV: Tensor, weight_R: Tensor) -> Tensor:
        """Take in one teacher's logits (overwritten) with its weights.

        Returns:
            (R,) divergence in nats, before weighting.
        """
        p_RV = self._buffer("p")
        normalise_(logits_RV, p_RV)
        gap_RV = logits_RV.sub_(self._logq_RV)  # log p − log q
        match self._name:
            case "forward_kl":
                value_R = gap_RV.mul_(p_RV).sum(-1)
                self._accumulate(p_RV, weight_R, 1.0, 1.0)
            case "reverse_kl":
                value_R = torch.mul(self._q_RV, gap_RV, out=p_RV).sum(-1).neg_()
                self._accumulate(gap_RV, weight_R, -1.0, value_R)
            case "jsd":
                rise_RV = self._log_mixture_over_q(gap_RV)
                value_R = gap_RV.sub_(rise_RV).mul_(p_RV).sum(-1) * self._share
                student_R = torch.mul(self._q_RV, rise_RV, out=p_RV).sum(-1) * (self._share - 1.0)
                value_R = value_R + student_R
                self._accumulate(rise_RV, weight_R, self._share - 1.0, student_R)
            case _:
                ratio_RV = gap_RV.sub_(self._log_mixture_over_q(gap_RV))
                value_R = torch.mul(p_RV, ratio_RV, out=p_RV).sum(-1)
                if self._need_grad:
                    torch.mul(self._q_RV, ratio_RV.exp_(), out=p_RV)
                    self._accumulate(ratio_RV, weight_R, self._share - 1.0, p_RV.sum(-1) * (self._share - 1.0))
        return value_R

    def gradient(self) -> Tensor:
        """(R, V) gradient of Σ w·D in the student's logits times the multiplier; overwrites the chunk's buffers."""
        assert self._total_RV is not None
        if self._name == "forward_kl":
            return self._q_RV.mul_(self._factor_R1).sub_(self._total_RV)
        return self._total_RV.sub_(self._factor_R1).mul_(self._q_RV)

    def _accumulate(self, a_RV: Tensor, weight_R: Tensor, sign: float, mean_R: Tensor | float) -> None:
        """Add ``sign · w · a`` to the total, and ``w · mean`` to the factor; ``a_RV`` may be overwritten."""
        if not self._need_grad:
            return
        weight_R = weight_R * self._multiplier
        self._factor_R1 = self._factor_R1 + (weight_R * mean_R).unsqueeze(-1)
        signed_R1 = (weight_R * sign).unsqueeze(-1)
        if self._total_RV is not None:
            self._total_RV.addcmul_(a_RV, signed_R1)
        elif self._teachers == 1:
            self._total_RV = a_RV.mul_(signed_R1)
        else:
            self._total_RV = torch.mul(a_RV, signed_R1, out=self._buffer("total"))

    def _log_mixture_over_q(self, gap_RV: Tensor) -> Tensor:
        """log(share·p + (1−share)·q) − log q, from log p − log q."""
        rest = torch.tensor(math.log1p(-self._share), dtype=self._dtype, device=gap_RV.device)
        shifted_RV = torch.add(gap_RV, math.log(self._share), out=self._buffer("mixture"))
        return torch.logaddexp(shifted_RV, rest, out=shifted_RV)

    def _buffer(self, name: str) -> Tensor:
        return self._workspace.get(name, self._rows, self._dtype)


def normalise_(logits_RV: Tensor, probs_RV: Tensor) -> None:
    """Turn logits into log-probabilities in place and write the probabilities beside, with one exponential."""
    logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
    torch.exp(logits_RV, out=probs_RV)
    mass_R1 = probs_RV.sum(-1, keepdim=True)
    probs_RV.div_(mass_R1)
    logits_RV.sub_(mass_R1.log_())
