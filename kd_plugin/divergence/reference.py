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

if TYPE_CHECKING:
    from kd_plugin.divergence.spec import Divergence


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
