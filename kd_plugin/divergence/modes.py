"""How several teachers combine at a position: the modes, and the groups of positions that share teachers.

A new way is a class here, listed in ``MODES``. The panel, its checks, ``kd-plugin plan`` and every host read from there
what it is called, what it needs, and which memory it takes.

Teachers that share one output head are projected together. The gradient of Σ wᵢ·KL(q ‖ pᵢ) in the student's logits is
q·(a − ⟨q, a⟩) with a = Σ wᵢ·(log q − log pᵢ), and what is constant over the vocabulary drops out of it. Each log pᵢ is
zᵢ less such a constant, its normalizer. So only Σ wᵢ·zᵢ matters, and where all zᵢ come from one head without a soft-cap
this is a single projection, of the weighted mean of the hidden states. As a distribution it is the normalized geometric
mean g of the pᵢ, and Σ wᵢ·KL(q ‖ pᵢ) = W·KL(q ‖ g) + a part that does not depend on the student and is never negative.

Shape suffixes: N positions of the batch, n positions of a group, R positions of a chunk, V tokens, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from kd_plugin.divergence.projection import require_temperature
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead

if TYPE_CHECKING:
    from kd_plugin.divergence.fused import GroupPass


Combine = Literal["route", "weighted_kl", "mixture", "confidence"]
_NEVER = -1e30  # stands for log 0 below all weights: exp(_NEVER − x) is 0, and -inf − (-inf) would be NaN


class Mode:
    """One way to combine teachers.

    Attributes:
        name: as users write it.
        help: what it minimises, as the end of a sentence that begins with its name.
        one_teacher: whether a row has one teacher, so that weights have no meaning.
        merges: whether teachers that share a head may be projected together; see ``shared``.
        needs: what it needs of a teacher's whole distribution, for the message that refuses other estimators; empty
            where any estimator will do.
        one_divergence: why a teacher can have no divergence of its own; empty where it can.
        scratch: whether it needs the entropies of teachers, which takes a buffer.
        buffers: (R, V) buffers that it needs beside those of one teacher; None for one, where teachers are summed.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    one_teacher: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    needs: ClassVar[str] = ""
    one_divergence: ClassVar[str] = ""
    scratch: ClassVar[bool] = False
    buffers: ClassVar[int | None] = None

    def chunk(self, group: GroupPass, logits_RV: Tensor, part: slice) -> Tensor:
        """Compare the student with the teachers at some positions.

        Args:
            group: holds the teachers, and takes values, weights and the gradient.
            logits_RV: the student's logits at the temperature of the run; may be overwritten.
            part: which positions of the group.

        Returns:
            (R,) entropy of the student, in nats.
        """
        raise NotImplementedError

    def loss(self, group: GroupPass) -> Tensor:
        """Return the loss of all positions of a group, a scalar in nats, from what its chunks left there."""
        total = group.joint_value.new_zeros(())
        for weight_n, value_n in zip(group.weights, group.values, strict=True):
            total = total + weight_n @ value_n
        return total


class WeightedKL(Mode):
    """Σ wᵢ·D(pᵢ, q), the objective of DeepSeek-V4 (arXiv 2606.19348, 5.1.2)."""

    name = "weighted_kl"
    help = "minimises the weighted sum of every teacher's divergence"
    merges = True

    def chunk(self, group: GroupPass, logits_RV: Tensor, part: slice) -> Tensor:
        """Add the teachers one by one, those that are compared alike together."""
        entropy_R = None
        for here_R, indices in group.by_comparison(logits_RV):
            entropy_R = here_R if entropy_R is None else entropy_R
            for i in indices:
                group.take(i, part)
                group.add(i, part, self._weight(group, i, part))
        assert entropy_R is not None
        return entropy_R

    def _weight(self, group: GroupPass, i: int, part: slice) -> Tensor:
        return group.weights[i][part]


class Route(WeightedKL):
    """D(p, q) from the one teacher of a row."""

    name = "route"
    help = "asks the one that the row's `teacher_id` names"
    one_teacher = True


class Mixture(Mode):
    """W·D(Σ wᵢ/W·pᵢ, q) with W = Σ wᵢ: the mean is formed in log space."""

    name = "mixture"
    help = "the divergence from the weighted mean of their probabilities"
    needs = "the mean of the teachers' probabilities over the whole vocabulary"
    one_divergence = "makes one distribution of all teachers, which has one divergence"
    buffers = 2

    def chunk(self, group: GroupPass, logits_RV: Tensor, part: slice) -> Tensor:
        """Mix the teachers, then compare with the mixture as with one teacher."""
        plan = group.plan
        entropy_R = group.start_joint(logits_RV)
        tiles = group.tiles
        total_R = torch.stack([weight[part] for weight in group.weights]).sum(0)
        divided_R = torch.where(total_R == 0, 1.0, total_R)
        mixed_RV = tiles.buffer("mixed").fill_(-torch.inf)
        for i in range(len(group.teachers)):
            weight_R = group.weights[i][part]
            group.take(i, part)
            if plan.values:
                group.values[i][part] = tiles.value(plan.divergence).where(weight_R != 0, 0.0)
            tiles.mix_into(mixed_RV, weight_R / divided_R)
        tiles.take(mixed_RV.masked_fill_((total_R == 0).unsqueeze(-1), 0.0))  # else -inf, without a weight
        group.joint_value[part] = tiles.add(total_R, plan.divergence).where(total_R != 0, 0.0)
        return entropy_R

    def loss(self, group: GroupPass) -> Tensor:
        """Return the loss from the mixture's values; those of the teachers are for the log."""
        if not group.weights:
            return group.joint_value.new_zeros(())
        return torch.stack(group.weights).sum(0) @ group.joint_value


class Confidence(WeightedKL):
    """W·Σ cᵢ·D(pᵢ, q), where cᵢ is proportional to wᵢ·exp(-entropy(pᵢ) / sharpness) at each position."""

    name = "confidence"
    help = "a sum whose weights follow each teacher's entropy at each token"
    merges = False
    needs = "the entropy of each teacher over the whole vocabulary"
    scratch = True

    def chunk(self, group: GroupPass, logits_RV: Tensor, part: slice) -> Tensor:
        """Weigh by confidences relative to the surest teacher so far, and scale at the end."""
        group.confidences = _Confidences(group.sharpness)
        entropy_R = super().chunk(group, logits_RV, part)
        scale_R, final = group.confidences.finish(torch.stack([weight[part] for weight in group.weights]).sum(0))
        group.rescale(scale_R)
        for i, weight_R in zip(group.order(), final, strict=True):
            group.weights[i][part] = weight_R
        return entropy_R

    def _weight(self, group: GroupPass, i: int, part: slice) -> Tensor:
        rescale_R, weight_R = group.confidences(group.weights[i][part], group.tiles.teacher_entropy())
        group.rescale(rescale_R)
        return weight_R


class _Confidences:
    """Softmax over teachers of log w − entropy / sharpness, formed while they come in one by one."""

    def __init__(self, sharpness: float) -> None:
        self._sharpness = sharpness
        self._scores: list[Tensor] = []
        self._top_R: Tensor | None = None
        self._sum_R: Tensor | None = None

    def __call__(self, weight_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to multiply earlier weights by, and this teacher's weight; up to a factor."""
        score_R = weight_R.log() - entropy_R / self._sharpness
        before_R = torch.full_like(score_R, _NEVER) if self._top_R is None else self._top_R
        self._top_R = torch.maximum(before_R, score_R)
        rescale_R, relative_R = (before_R - self._top_R).exp(), (score_R - self._top_R).exp()
        self._sum_R = relative_R if self._sum_R is None else self._sum_R * rescale_R + relative_R
        self._scores.append(score_R)
        return rescale_R, relative_R

    def finish(self, total_R: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the factor that was left out, and each teacher's weight; they sum to ``total_R``."""
        assert self._top_R is not None and self._sum_R is not None
        factor_R = torch.where(self._sum_R == 0, 0.0, total_R / self._sum_R)
        return factor_R, [(score_R - self._top_R).exp() * factor_R for score_R in self._scores]


MODES: Mapping[str, Mode] = {mode.name: mode for mode in (Route(), WeightedKL(), Mixture(), Confidence())}


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
            if mode.one_divergence and _outcomes(term) != _outcomes(group.terms[0]):
                raise ConfigError(
                    f"Group {g}: {mode.name} {mode.one_divergence}, but its teachers share different tokens with the "
                    "student. Give all of them the tokens that all share, with SharedTokens.within."
                )
            if mode.one_divergence and term.divergence is not None:
                raise ConfigError(
                    f"Group {g}, teacher {t} has a divergence of its own, but {mode.name} {mode.one_divergence}. Set "
                    "the divergence of the call, or combine by weighted_kl."
                )


def _outcomes(term: TeacherTerm) -> object:
    shared = term.signal.shared
    return None if shared is None else (shared.runs, shared.student_size)


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
        mergeable = mergeable and term.signal.shared is None  # the mass of a rest is no mean of the teachers'
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
