"""Divergences on full distributions by their formulas: the readable form, and in float64 the oracle of the others.

The formulas stand with the divergences in ``spec``.

Shape suffixes: N positions, V vocabulary. Arguments are log-probabilities (N, V) in nats; results are nats per
position (N,). With teacher p and student q. Everything is differentiable by autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError
from kd_plugin.vocab import SharedTokens

if TYPE_CHECKING:
    from kd_plugin.divergence.spec import Divergence

# Probability that a teacher gives to what it cannot say; left out of the comparison, that would be free to the student
IMPOSSIBLE = 1e-6


def kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), with the convention 0·log 0 = 0."""
    impossible = logp_NV == -math.inf
    gap_NV = torch.where(impossible, 0.0, logp_NV - torch.where(impossible, 0.0, logq_NV))
    return (logp_NV.exp() * gap_NV).sum(-1)


def from_logprobs(student_logprobs: Tensor, teacher_logprobs: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence that ``divergence`` names, of two sets of log-probabilities (N, V)."""
    if student_logprobs.shape != teacher_logprobs.shape:
        raise ConfigError(
            f"Student log-probabilities have shape {tuple(student_logprobs.shape)} and the teacher's "
            f"{tuple(teacher_logprobs.shape)}; both must be (positions, vocabulary) over the same tokens. Cut padded "
            "rows on both sides with OutputHead.vocab_size."
        )
    return divergence.kind.formula(student_logprobs, teacher_logprobs, divergence)


def divergence_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    shared: SharedTokens | None = None,
) -> Tensor:
    """D(teacher, student) per position, from full logits.

    Args:
        student_logits: (N, V), after scale and soft-cap, over real tokens only.
        teacher_logits: (N, V), likewise; of a teacher with another vocabulary over its own tokens.
        divergence: which divergence.
        temperature: divides both logits; the result is not multiplied by its square.
        shared: what both vocabularies share, where they differ: D is over the shared tokens and all others as one
            outcome, or given that the token is a shared one; see :mod:`kd_plugin.divergence.across.folding`.

    Returns:
        (N,) nats, in the dtype of the logits.

    Raises:
        ConfigError: the shapes differ.
    """
    student_logprobs = torch.log_softmax(student_logits / temperature, -1)
    teacher_logprobs = torch.log_softmax(teacher_logits / temperature, -1)
    if shared is not None:
        least = divergence.least_rest(shared.student_has_rest, shared.teacher_has_rest)
        student_logprobs = outcome_logprobs(student_logprobs, shared, None if least is None else 0.0)
        teacher_logprobs = outcome_logprobs(teacher_logprobs, shared, least)
    return from_logprobs(student_logprobs, teacher_logprobs, divergence)


def outcome_logprobs(logprobs: Tensor, shared: SharedTokens, least: float | None) -> Tensor:
    """Return (N, J) log-probabilities of the shared tokens and, if it is an outcome, of all others together.

    Args:
        logprobs: (N, V) of one side's tokens.
        shared: what both vocabularies share.
        least: probability of the others, relative to the shared ones', at least. None where they are no outcome: the
            result is given that the token is a shared one.
    """
    common = logprobs[:, shared.ids()]
    if least is None:
        return common.log_softmax(-1)
    others = logprobs[:, shared.rest(logprobs.shape[1])].logsumexp(-1, keepdim=True)
    if least:
        others = torch.maximum(others, common.logsumexp(-1, keepdim=True) + math.log(least))
    found = torch.cat([common, others], -1)
    return found.log_softmax(-1) if least else found
