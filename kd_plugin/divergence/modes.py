"""How several teachers' distributions make one loss: a class for each way, with its name, its help and its loss.

A new way is a class here, listed in ``MODES``. The panel, its checks, ``kd-plugin plan`` and every host read from there
what it is called, what it needs, and which memory it takes.

Shape suffixes: R positions of a chunk, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

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
        """Add the teachers one by one, those of one temperature together."""
        entropy_R = None
        for here_R, indices in group.by_temperature(logits_RV):
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
        tiles, plan = group.tiles, group.plan
        entropy_R = tiles.start(logits_RV, group.project.multiplier, 1)
        total_R = torch.stack([weight[part] for weight in group.weights]).sum(0)
        divided_R = torch.where(total_R == 0, 1.0, total_R)
        mixed_RV = group.project.workspace.get("mixed", logits_RV.shape[0], logits_RV.dtype).fill_(-torch.inf)
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
        group.tiles.rescale(scale_R)
        for i, weight_R in zip(group.order(), final, strict=True):
            group.weights[i][part] = weight_R
        return entropy_R

    def _weight(self, group: GroupPass, i: int, part: slice) -> Tensor:
        rescale_R, weight_R = group.confidences(group.weights[i][part], group.tiles.teacher_entropy())
        group.tiles.rescale(rescale_R)
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
