"""What the panel loss is asked: which positions share which teachers, and how those are combined.

Shape suffixes: N positions of the batch, n positions of a group, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.projection import require_temperature
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal


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
