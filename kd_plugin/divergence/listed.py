"""Sparse targets as a coarse distribution: the K listed tokens, and one outcome for all the rest.

Shape suffixes: N positions, K listed tokens, J = K + 1 outcomes (the last is the rest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kd_plugin.divergence.reference import from_logprobs
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import SparseSignal

Tail = Literal["bucket", "keep", "renormalise"]

# Log-probability given on both sides to an outcome that neither side can produce (padding, an empty rest): it adds
# exactly 0 to every divergence and its gradient, where -inf would add inf - inf.
_ABSENT = -1e4


@dataclass(frozen=True)
class Listed:
    """Targets of some positions, made safe to gather and scatter with.

    Attributes:
        ids_NK: token ids; padding repeats the position's first real token, so that a scatter of equal values
            writes it twice and nothing else.
        source_NK: for each entry, the entry that it repeats: itself, or the first real one for padding.
        logp_NK: teacher's log-probabilities in nats; -inf for padding.
        tail_N1: log of the mass not listed.
        draws_NK: counts of sampled targets, or None.
        any_N1: whether the position has a real entry at all.
    """

    ids_NK: Tensor
    source_NK: Tensor
    logp_NK: Tensor
    tail_N1: Tensor
    draws_NK: Tensor | None
    any_N1: Tensor

    @classmethod
    def from_signal(cls, signal: SparseSignal, dtype: torch.dtype) -> Listed:
        """Prepare ``signal``; log-probabilities become ``dtype``."""
        real_NK = signal.logprobs != -math.inf
        first_N1 = real_NK.to(torch.uint8).argmax(-1, keepdim=True)
        entries_1K = torch.arange(signal.ids.shape[1], device=signal.ids.device).unsqueeze(0)
        source_NK = torch.where(real_NK, entries_1K, first_N1)
        any_N1 = real_NK.any(-1, keepdim=True)
        ids_NK = torch.where(any_N1, signal.ids.to(torch.int64).gather(1, source_NK), 0)
        draws = None if signal.draws is None else signal.draws.to(dtype)
        return cls(ids_NK, source_NK, signal.logprobs.to(dtype), signal.tail_logmass.to(dtype)[:, None], draws, any_N1)

    def __getitem__(self, part: slice) -> Listed:
        draws = None if self.draws_NK is None else self.draws_NK[part]
        return Listed(
            self.ids_NK[part], self.source_NK[part], self.logp_NK[part], self.tail_N1[part], draws, self.any_N1[part]
        )

    def spread(self, values_NK: Tensor, otherwise_NK: Tensor) -> Tensor:
        """Values to scatter at ``ids_NK``: each entry's own, or ``otherwise`` where the position lists nothing."""
        return torch.where(self.any_N1, values_NK.gather(1, self.source_NK), otherwise_NK)


def check_tail(tail: str, divergence: Divergence, sampled: bool) -> None:
    """Refuse combinations of tail, divergence and kind of target that have no meaning.

    Raises:
        ConfigError: says which and why.
    """
    if tail not in get_args(Tail):
        raise ConfigError(f"Unknown tail {tail!r}; expected one of {', '.join(get_args(Tail))}.")
    if sampled and divergence.name != "forward_kl":
        raise ConfigError(
            f"{divergence.name} cannot be computed from sampled targets: their counts are an unbiased estimate of an "
            "expectation under the teacher, which only forward_kl is. Use forward_kl, or capture top-k targets."
        )
    if sampled and tail != "bucket":
        raise ConfigError(
            f"tail={tail!r} was given for sampled targets, which have no tail: counts already estimate the whole "
            "distribution. Leave tail at its default."
        )
    if tail != "bucket" and divergence.name != "forward_kl":
        raise ConfigError(
            f"tail={tail!r} is defined for forward_kl only, got {divergence.name}: it leaves the student's mass on "
            'unlisted tokens out, which every other divergence must weigh. Use tail="bucket".'
        )


def listed_divergence(
    target: Listed, logq_NJ: Tensor, divergence: Divergence, tail: str, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence of coarse distributions, and its derivative in the student's coarse log-probabilities.

    Args:
        target: the teacher's side.
        logq_NJ: student's log-probabilities of the listed tokens and of the rest; -inf where there is none.
        divergence: which divergence.
        tail: how the rest is treated.
        need_grad: whether to differentiate.

    Returns:
        (N,) nats, and (N, J) dD/dlogq or None. Derivatives of the formulas in ``reference`` are autograd's: the
        tensors are small, and the formulas stay in one place.
    """
    logp_NK = target.logp_NK
    if target.draws_NK is not None or tail != "bucket":
        if target.draws_NK is not None:
            weight_NK = target.draws_NK / target.draws_NK.sum(-1, keepdim=True)
        else:
            if tail == "renormalise":
                logp_NK = logp_NK - logp_NK.logsumexp(-1, keepdim=True)
            weight_NK = logp_NK.exp()
        padding_NK = target.logp_NK == -math.inf
        gap_NK = torch.where(padding_NK, 0.0, logp_NK - torch.where(padding_NK, 0.0, logq_NJ[:, :-1]))
        slope_NJ = torch.cat([-weight_NK, torch.zeros_like(target.tail_N1)], -1) if need_grad else None
        return (weight_NK * gap_NK).sum(-1), slope_NJ
    logp_NJ = torch.cat([logp_NK, target.tail_N1], -1)
    absent_NJ = (logp_NJ == -math.inf) & (logq_NJ == -math.inf)
    logp_NJ, logq_NJ = logp_NJ.masked_fill(absent_NJ, _ABSENT), logq_NJ.masked_fill(absent_NJ, _ABSENT)
    if not need_grad:
        return from_logprobs(logq_NJ, logp_NJ, divergence), None
    with torch.enable_grad():
        leaf_NJ = logq_NJ.detach().requires_grad_()
        value_N = from_logprobs(leaf_NJ, logp_NJ, divergence)
        (slope_NJ,) = torch.autograd.grad(value_N.sum(), leaf_NJ)
    return value_N.detach(), slope_NJ
