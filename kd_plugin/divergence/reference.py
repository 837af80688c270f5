"""Each divergence as its formula, on full distributions: the readable form, and in float64 the oracle of the others.

Shape suffixes: N positions, V vocabulary. Arguments are log-probabilities (N, V) in nats; results are nats per
position (N,). With teacher p and student q. Everything is differentiable by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError


def kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), with the convention 0·log 0 = 0."""
    impossible = logp_NV == -math.inf
    gap_NV = torch.where(impossible, 0.0, logp_NV - torch.where(impossible, 0.0, logq_NV))
    return (logp_NV.exp() * gap_NV).sum(-1)


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(teacher ‖ student): covers all that the teacher might say."""
    return kl(teacher_logprobs, student_logprobs)


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(student ‖ teacher): punishes what the teacher would not say."""
    return kl(student_logprobs, teacher_logprobs)


def jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, beta: float) -> Tensor:
    """β·KL(p ‖ m) + (1−β)·KL(q ‖ m) with m = β·p + (1−β)·q (arXiv 2306.13649, eq. 1)."""
    log_mixture = torch.logaddexp(teacher_logprobs + math.log(beta), student_logprobs + math.log1p(-beta))
    return beta * kl(teacher_logprobs, log_mixture) + (1.0 - beta) * kl(student_logprobs, log_mixture)


def skew_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float) -> Tensor:
    """KL(p ‖ α·p + (1−α)·q) (arXiv 2402.03898, eq. 3); ``alpha=0`` is the forward KL."""
    if alpha == 0.0:
        return forward_kl(student_logprobs, teacher_logprobs)
    log_mixture = torch.logaddexp(teacher_logprobs + math.log(alpha), student_logprobs + math.log1p(-alpha))
    return kl(teacher_logprobs, log_mixture)


def from_logprobs(student_logprobs: Tensor, teacher_logprobs: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence that ``divergence`` names, of two sets of log-probabilities (N, V)."""
    if student_logprobs.shape != teacher_logprobs.shape:
        raise ConfigError(
            f"Student log-probabilities have shape {tuple(student_logprobs.shape)} and the teacher's "
            f"{tuple(teacher_logprobs.shape)}; both must be (positions, vocabulary) over the same tokens. Cut padded "
            "rows on both sides with OutputHead.vocab_size."
        )
    match divergence.name:
        case "forward_kl":
            return forward_kl(student_logprobs, teacher_logprobs)
        case "reverse_kl":
            return reverse_kl(student_logprobs, teacher_logprobs)
        case "jsd":
            return jsd(student_logprobs, teacher_logprobs, divergence.beta)
        case _:
            return skew_kl(student_logprobs, teacher_logprobs, divergence.alpha)


def divergence_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, temperature: float = 1.0
) -> Tensor:
    """D(teacher, student) per position, from full logits.

    Args:
        student_logits: (N, V), after scale and soft-cap, over real tokens only.
        teacher_logits: (N, V), likewise.
        divergence: which divergence.
        temperature: divides both logits; the result is not multiplied by its square.

    Returns:
        (N,) nats, in the dtype of the logits.

    Raises:
        ConfigError: the shapes differ.
    """
    return from_logprobs(
        torch.log_softmax(student_logits / temperature, -1),
        torch.log_softmax(teacher_logits / temperature, -1),
        divergence,
    )
