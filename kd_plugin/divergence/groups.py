"""What the panel loss is asked: which positions share which teachers, and how those are combined.

Teachers that share one output head are projected together. The gradient of Σ wᵢ·KL(q ‖ pᵢ) in the student's logits is
q·(a − ⟨q, a⟩) with a = Σ wᵢ·(log q − log pᵢ), and what is constant over the vocabulary drops out of it. Each log pᵢ is
zᵢ less such a constant, its normalizer. So only Σ wᵢ·zᵢ matters, and where all zᵢ come from one head without a soft-cap
this is a single projection, of the weighted mean of the hidden states. As a distribution it is the normalised geometric
mean g of the pᵢ, and Σ wᵢ·KL(q ‖ pᵢ) = W·KL(q ‖ g) + a part that does not depend on the student and is never negative.

Shape suffixes: N positions of the batch, n positions of a group, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.projection import require_temperature
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead


@dataclass(frozen=True)
class TeacherTerm:
    """One teacher's part in a group.

    Attributes:
        signal: hidden states (n, H) at the group's positions, and the teacher's head.
        weights: (n,) weight of this teacher at each position, or None for one everywhere. A position of weight 0
            is left out: it adds nothing, whatever its hidden states hold.
        divergence: this teacher's own, or None for the call's. A mixture has one divergence, so none here.
        temperature: at which this teacher is compared, or None for the call's: it divides the logits of both sides.
            In a mixture it divides this teacher's alone, since there is one student side for all.
    """

    signal: HiddenSignal
    weights: Tensor | None = None
    divergence: Divergence | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class PanelGroup:
    """Positions that share the same teachers. Groups of one call are disjoint.

    A routed batch has one group a teacher; ``weighted_kl`` has one group with all teachers.

    Attributes:
        positions: (n,) int64 rows of the student's hidden states, or None for all N.
        terms: the teachers, in any order.
        combining: how they are combined, a name in :data:`~kd_plugin.divergence.modes.MODES`.
        sharpness: nats; the temperature of the confidence weights. Small ones leave the surest teacher alone.
    """

    positions: Tensor | None
    terms: tuple[TeacherTerm, ...]
    combining: str = "weighted_kl"
    sharpness: float = 1.0


def check_groups(hidden_NH: Tensor, groups: Sequence[PanelGroup]) -> None:
    """Refuse shapes that do not fit, before anything is projected."""
    for g, group in enumerate(groups):
        if group.positions is not None and (group.positions.dim() != 1 or group.positions.dtype != torch.int64):
            raise ConfigError(
                f"Group {g}: positions have dtype {group.positions.dtype} and shape {tuple(group.positions.shape)}; "
                "expected int64 row numbers (n,). For a mask use mask.nonzero().squeeze(-1)."
            )
        if not (math.isfinite(group.sharpness) and group.sharpness > 0.0):
            raise ConfigError(f"Group {g}: sharpness is {group.sharpness}; it divides entropies and must be positive.")
        count = hidden_NH.shape[0] if group.positions is None else group.positions.shape[0]
        for t, term in enumerate(group.terms):
            if term.signal.hidden.dim() != 2 or len(term.signal) != count:
                raise ConfigError(
                    f"Group {g}, teacher {t}: hidden states have shape {tuple(term.signal.hidden.shape)} for {count} "
                    "positions; expected one row a position of the group, in the group's order."
                )
            if term.weights is not None and term.weights.shape != (count,):
                raise ConfigError(
                    f"Group {g}, teacher {t}: weights have shape {tuple(term.weights.shape)}; expected ({count},)."
                )
            if term.temperature is not None:
                require_temperature(term.temperature)
            mode = MODES[group.combining]
            if mode.one_divergence and term.divergence is not None:
                raise ConfigError(
                    f"Group {g}, teacher {t} has a divergence of its own, but {mode.name} {mode.one_divergence}. Set "
                    "the divergence of the call, or combine by weighted_kl."
                )


def merged_by_head(group: PanelGroup, divergence: Divergence) -> PanelGroup:
    """Replace the teachers of ``group`` that share a head by one with the same gradient.

    Args:
        group: a group of a loss whose values nobody reads.
        divergence: of the terms that have none of their own.

    Returns:
        The group itself where nothing can be merged: another combining or divergence, a soft-cap, heads or
        temperatures that differ.
    """
    if not MODES[group.combining].merges:
        return group
    alike: dict[object, list[TeacherTerm]] = {}
    for term in group.terms:
        mergeable = (term.divergence or divergence).name == "reverse_kl" and term.signal.head.softcap is None
        key = (head_identity(term.signal.head), term.temperature) if mergeable else id(term)
        alike.setdefault(key, []).append(term)
    if len(alike) == len(group.terms):
        return group
    return replace(group, terms=tuple(_merged(terms) for terms in alike.values()))


def _merged(terms: list[TeacherTerm]) -> TeacherTerm:
    if len(terms) == 1:
        return terms[0]
    dtype = torch.promote_types(terms[0].signal.hidden.dtype, torch.float32)
    total_nH = torch.zeros_like(terms[0].signal.hidden, dtype=dtype)
    total_n = torch.zeros(len(terms[0].signal), dtype=dtype, device=total_nH.device)
    for term in terms:
        if term.weights is None:
            total_nH += term.signal.hidden
            total_n += 1.0
        else:
            weight_n1 = term.weights.to(dtype).unsqueeze(-1)
            total_nH += torch.where(weight_n1 != 0, term.signal.hidden * weight_n1, 0.0)
            total_n += term.weights
    mean_nH = total_nH / torch.where(total_n == 0, 1.0, total_n).unsqueeze(-1)
    hidden_nH = mean_nH.to(terms[0].signal.hidden.dtype)
    return replace(terms[0], signal=HiddenSignal(hidden_nH, terms[0].signal.head), weights=total_n)


def head_identity(head: OutputHead) -> tuple[object, ...]:
    """Return what two heads must have in common to be one: the same tensors, read the same way."""
    return id(head.weight), id(head.bias), head.vocab_size, head.logit_scale, head.softcap
