"""The work on a tile of logits between two matrix products, as pure functions that a compiler fuses.

Each function becomes one kernel, or two where a row's partial results are brought together: it reads every tile once,
and writes at most one. ``tiles.py`` does the same step by step in memory that is there already, without a compiler;
``spec.Kind.cells`` has what each divergence adds.

A row's statistics come from blocks of tokens, each with its own maximum, so that one read gives all of them: the
normalizer, the entropy, and for the two KL divergences the value, Σ p·(z_p − z_q) less the difference of normalizers.

Shape suffixes: R positions of a chunk, V tokens, n blocks of B tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_plugin.divergence.spec import Divergence

# A block fits the registers of a GPU's thread block, so that Inductor reads it once; on a CPU it stays in the cache
_BLOCK = 512


def statistics(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalizer (R, 1), log Σ exp z, the entropy (R,) in nats, and Σ exp(z − normalizer) (R,).

    The last would be one, were the normalizer not rounded: by 1e-4 where logits are in the thousands.
    """
    found = [_moments(piece) for piece in _pieces(logits_RV)]
    top_R1, log_mass_R1, share_Rn = _joined(found)
    inner_Rn = torch.cat([torch.where(e == 0.0, 0.0, e * below).sum(-1) for _, below, e, _ in found], 1)
    mass_Rn = torch.cat([mass for _, _, _, mass in found], 1)
    shift_Rn = torch.cat([largest for largest, _, _, _ in found], 1) - top_R1
    shift_Rn = torch.where(mass_Rn == 0.0, 0.0, shift_Rn)
    mean_R1 = ((inner_Rn + mass_Rn * shift_Rn) * share_Rn).sum(-1, keepdim=True) / log_mass_R1.exp()
    lse_R1 = top_R1 + log_mass_R1
    return lse_R1, (log_mass_R1 - mean_R1).squeeze(1), (log_mass_R1 - (lse_R1 - top_R1)).exp().squeeze(1)


def kl_statistics(
    student_RV: Tensor, student_lse_R1: Tensor, teacher_RV: Tensor, *, of_student: bool
) -> tuple[Tensor, Tensor]:
    """Return the teacher's normalizer (R, 1) and the KL divergence (R,) in nats, in one read of both tiles.

    Args:
        student_RV: the student's logits.
        student_lse_R1: their normalizer.
        teacher_RV: the teacher's logits.
        of_student: KL(q ‖ p), the reverse; else KL(p ‖ q), the forward.
    """
    found = [_moments(piece) for piece in _pieces(teacher_RV)]
    top_R1, log_mass_R1, share_Rn = _joined(found)
    lse_R1, sums, masses = top_R1 + log_mass_R1, [], []
    for student, (_, below, e, mass) in zip(_pieces(student_RV), found, strict=True):
        logq = student - student_lse_R1.unsqueeze(-1)
        weight = logq.exp() if of_student else e
        gap = logq - below if of_student else below - logq
        sums.append(torch.where(weight == 0.0, 0.0, weight * gap).sum(-1))
        masses.append(weight.sum(-1) if of_student else mass)
    # What a block's logits are below its largest one is known to more digits than they are themselves
    shift_Rn = torch.cat([torch.where(largest == -math.inf, lse_R1, largest) for largest, _, _, _ in found], 1) - lse_R1
    sum_Rn, mass_Rn = torch.cat(sums, 1), torch.cat(masses, 1)
    if of_student:
        # Over the sum of the weights as they were rounded, so that what one token has alone falls away in the gradient
        return lse_R1, (sum_Rn - mass_Rn * shift_Rn).sum(-1) / mass_Rn.sum(-1)
    return lse_R1, ((sum_Rn + mass_Rn * shift_Rn) * share_Rn).sum(-1) / log_mass_R1.exp().squeeze(1)


def compared(
    student_RV: Tensor,
    student_lse_R1: Tensor,
    teacher_RV: Tensor,
    teacher_lse_R1: Tensor,
    total_RV: Tensor | None,
    scale_R1: Tensor | None,
    weight_R1: Tensor | None,
    *,
    divergence: Divergence,
    first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return value and ⟨q, a⟩ (R,) of one teacher; where ``total_RV`` is given, add its weighted a there.

    Args:
        student_RV: the student's logits.
        student_lse_R1: their normalizer.
        teacher_RV: the teacher's logits.
        teacher_lse_R1: their normalizer.
        total_RV: Σ w·a of the teachers before, or of a ``direct`` divergence −Σ w·q·a; written to.
        scale_R1: what the sum so far is multiplied by first; None for one.
        weight_R1: of this teacher.
        divergence: which one.
        first: whether ``total_RV`` holds nothing yet.
    """
    logq_RV, logp_RV = student_RV - student_lse_R1, teacher_RV - teacher_lse_R1
    value_RV, mean_RV, slope_RV = divergence.kind.cells(logq_RV, logp_RV, divergence)
    if total_RV is not None:
        assert weight_R1 is not None
        _add(total_RV, scale_R1, slope_RV * weight_R1, first)
    return value_RV.sum(-1), mean_RV.sum(-1)


def kl_added(
    teacher_RV: Tensor,
    teacher_lse_R1: Tensor,
    total_RV: Tensor,
    scale_R1: Tensor | None,
    weight_R1: Tensor,
    *,
    of_student: bool,
    first: bool,
) -> None:
    """Add one teacher's part of the gradient of a KL divergence to ``total_RV``, without a look at the student.

    That is w·p for the forward, and −w·log p for the reverse: there a = log q − log p, and :func:`gradient` adds the
    log q of all teachers together. Arguments are as in :func:`compared`.
    """
    logp_RV = teacher_RV - teacher_lse_R1
    _add(total_RV, scale_R1, (-logp_RV if of_student else logp_RV.exp()) * weight_R1, first)


def gradient(
    student_RV: Tensor,
    student_lse_R1: Tensor,
    factor_R1: Tensor,
    logq_R1: Tensor | None,
    sum_RV: Tensor | None,
    sum_scale_R1: Tensor | None,
    direct_RV: Tensor | None,
    direct_scale_R1: Tensor | None,
    teacher_RV: Tensor | None,
    teacher_lse_R1: Tensor | None,
    weight_R1: Tensor | None,
    out_RV: Tensor,
    *,
    divergence: Divergence,
) -> None:
    """Write the gradient in the student's projection, q·(Σ w·a + factor), to ``out_RV``, in its dtype.

    Args:
        student_RV: the student's logits.
        student_lse_R1: their normalizer.
        factor_R1: −Σ w·⟨q, a⟩.
        logq_R1: how much of log q is still to be added to Σ w·a; None for nothing.
        sum_RV: Σ w·a of all teachers but the last; None where there is none.
        sum_scale_R1: what it is multiplied by; None for one.
        direct_RV: −Σ w·q·a of the teachers whose divergence is ``direct``; None where there is none.
        direct_scale_R1: what it is multiplied by; None for one.
        teacher_RV: the logits of the last teacher, whose part is not in the sums; None where it is.
        teacher_lse_R1: their normalizer.
        weight_R1: its weight.
        out_RV: what is written to; may be ``student_RV``.
        divergence: of the last teacher.
    """
    logq_RV = student_RV - student_lse_R1
    q_RV, total_RV = logq_RV.exp(), factor_R1
    if logq_R1 is not None:
        total_RV = total_RV + logq_RV * logq_R1
    if sum_RV is not None:
        total_RV = total_RV + (sum_RV if sum_scale_R1 is None else sum_RV * sum_scale_R1)
    taken_RV = direct_RV if direct_RV is None or direct_scale_R1 is None else direct_RV * direct_scale_R1
    if teacher_RV is not None:
        assert teacher_lse_R1 is not None and weight_R1 is not None
        slope_RV = divergence.kind.cells(logq_RV, teacher_RV - teacher_lse_R1, divergence)[2] * weight_R1
        if not divergence.kind.direct(divergence):
            total_RV = total_RV + slope_RV
        else:
            taken_RV = slope_RV if taken_RV is None else taken_RV + slope_RV
    # Where the student has no mass a may be infinite, and the product is still nothing
    found_RV = torch.where(q_RV == 0.0, 0.0, q_RV * total_RV)
    out_RV.copy_(found_RV if taken_RV is None else found_RV - taken_RV)


def mixed(mixture_RV: Tensor, teacher_RV: Tensor, teacher_lse_R1: Tensor, log_share_R1: Tensor) -> None:
    """Add a teacher to a mixture of log-probabilities (R, V), in place; ``log_share_R1`` is −inf for none."""
    logp_RV = teacher_RV - teacher_lse_R1 + log_share_R1
    top_RV = torch.maximum(mixture_RV, logp_RV)
    low_RV = torch.minimum(mixture_RV, logp_RV)
    apart_RV = torch.where(top_RV == -math.inf, 0.0, low_RV - top_RV)
    mixture_RV.copy_(top_RV + apart_RV.exp().log1p())


def _add(total_RV: Tensor, scale_R1: Tensor | None, part_RV: Tensor, first: bool) -> None:
    """Scale what ``total_RV`` holds, unless it holds nothing yet, and add to it."""
    if not first:
        part_RV = part_RV + (total_RV if scale_R1 is None else total_RV * scale_R1)
    total_RV.copy_(part_RV)


def _pieces(logits_RV: Tensor) -> list[Tensor]:
    """Cut rows into blocks: (R, n, B), and (R, 1, rest) where V is not a multiple of B."""
    size = logits_RV.shape[1]
    whole = size - size % _BLOCK
    pieces = [logits_RV.narrow(1, 0, whole).unflatten(1, (whole // _BLOCK, _BLOCK))] if whole else []
    return [*pieces, logits_RV.narrow(1, whole, size - whole).unsqueeze(1)] if whole < size else pieces


def _moments(piece: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of each block the largest logit, the logits below it, their exponentials, and the sum of these."""
    largest = piece.amax(-1)
    below = piece - torch.where(largest == -math.inf, 0.0, largest).unsqueeze(-1)
    e = below.exp()
    return largest, below, e, e.sum(-1)


def _joined(found: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit of a row (R, 1), log Σ exp(z − largest) (R, 1), and each block's factor in it (R, n)."""
    largest_Rn = torch.cat([largest for largest, _, _, _ in found], 1)
    top_R1 = largest_Rn.amax(-1, keepdim=True)
    share_Rn = (largest_Rn - top_R1).exp()
    mass_Rn = torch.cat([mass for _, _, _, mass in found], 1)
    return top_R1, (mass_Rn * share_Rn).sum(-1, keepdim=True).log(), share_Rn
