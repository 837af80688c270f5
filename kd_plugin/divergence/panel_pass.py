"""One walk over the positions of a panel loss: every chunk is projected, compared and differentiated.

Shape suffixes: N positions of the batch, n positions of a group, R positions of a chunk, V tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_plugin.divergence.groups import PanelGroup, TeacherTerm
from kd_plugin.divergence.projection import (
    Projector,
    StudentGradient,
    Workspace,
    chunk_rows,
    chunks,
    require_matching_rows,
    without_unused,
)
from kd_plugin.divergence.shared import head_identity
from kd_plugin.divergence.spec import Divergence
from kd_plugin.divergence.tiles import Tiles
from kd_plugin.signals import OutputHead

_NEVER = -1e30  # log-weight below all others: exp(x − _NEVER) overflows to nothing that is used, -inf would give NaN


@dataclass(frozen=True)
class Plan:
    """The arguments of the loss that autograd does not look into; see ``fused_panel_divergence``."""

    student: OutputHead
    groups: tuple[PanelGroup, ...]
    divergence: Divergence
    temperature: float
    needs: tuple[bool, bool, bool]
    statistics: torch.dtype
    autocast: torch.dtype | None
    values: bool
    rows: int | None = None  # longest chunk; None chooses by vocabulary and device


@dataclass(frozen=True)
class Found:
    """What a pass leaves: the loss, entropy (N,), per group and term value and weight (n,), and the gradients."""

    loss: Tensor
    entropy_N: Tensor
    values: list[Tensor]
    weights: list[Tensor]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def panel_pass(hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, student: OutputHead, plan: Plan) -> Found:
    """Compute everything; ``student`` is the head's real rows, ``weight`` and ``bias`` are autograd's."""
    device, statistics, dtype = hidden_NH.device, plan.statistics, plan.autocast or hidden_NH.dtype
    vocab_size, need_grad = student.weight.shape[0], any(plan.needs)
    rows = plan.rows or chunk_rows(vocab_size, device)
    workspace = Workspace(min(rows, max(hidden_NH.shape[0], 1)), vocab_size, device)
    project = Projector(student, "student", workspace, dtype, statistics, plan.temperature, keep_slope=need_grad)
    gradient = StudentGradient(hidden_NH, weight, bias, project, plan.needs, statistics)
    tiles = Tiles(workspace, statistics, need_grad)
    entropy_N = torch.zeros(hidden_NH.shape[0], dtype=statistics, device=device)
    found = Found(torch.zeros((), dtype=statistics, device=device), entropy_N, [], [], gradient.take())
    for group in plan.groups:
        count = hidden_NH.shape[0] if group.positions is None else group.positions.shape[0]
        teachers = _projectors(group, student, workspace, plan)
        walk = _GroupPass(group, teachers, project, tiles, plan, count)
        for part in chunks(count if teachers else 0, rows):
            where = part if group.positions is None else group.positions[part]
            used_R = torch.stack([weight[part] != 0 for weight in walk.weights]).any(0)
            hidden_RH = without_unused(hidden_NH.detach()[where].to(dtype), used_R.unsqueeze(-1))
            entropy_N[where] = walk.chunk(hidden_RH, part).where(used_R, 0.0)
            if need_grad:
                gradient.add(tiles.gradient(), hidden_RH, where)
        found.loss.add_(walk.loss())
        found.values.extend(walk.values)
        found.weights.extend(walk.weights)
    return found


def _projectors(group: PanelGroup, student: OutputHead, workspace: Workspace, plan: Plan) -> list[Projector]:
    """Bring the heads of a group to the dtype of the product, each once."""
    projectors = []
    ready: dict[object, OutputHead] = {}
    for term in group.terms:
        dtype = plan.autocast or term.signal.hidden.dtype
        key = (head_identity(term.signal.head), dtype)
        if key not in ready:
            head = term.signal.head.real_rows()
            require_matching_rows(student, head, "a teacher of the panel")
            ready[key] = replace(head, weight=head.weight.detach().to(workspace.device, dtype))
        temperature = plan.temperature if term.temperature is None else term.temperature
        projectors.append(Projector(ready[key], "teacher", workspace, dtype, plan.statistics, temperature))
    return projectors


class _GroupPass:
    """The chunks of one group, and the values and weights of its terms, filled chunk by chunk."""

    def __init__(
        self,
        group: PanelGroup,
        teachers: Sequence[Projector],
        project: Projector,
        tiles: Tiles,
        plan: Plan,
        count: int,
    ) -> None:
        self._group, self._teachers, self._project, self._tiles, self._plan = group, teachers, project, tiles, plan
        device = project.workspace.device
        self.weights = [_weights(term, count, plan.statistics, device) for term in group.terms]
        self.values = [torch.zeros(count, dtype=plan.statistics, device=device) for _ in group.terms]
        self._mixture_value = torch.zeros(count, dtype=plan.statistics, device=device)

    def chunk(self, hidden_RH: Tensor, part: slice) -> Tensor:
        """Compare the student with every teacher at the positions of ``part``; return its entropy (R,)."""
        logits_RV = self._project(hidden_RH)
        if self._group.combining == "mixture":
            return self._mix(logits_RV, part)
        by_temperature: dict[float, list[int]] = {}
        for i, term in enumerate(self._group.terms):
            temperature = self._plan.temperature if term.temperature is None else term.temperature
            by_temperature.setdefault(temperature, []).append(i)
        weigh = _Confidence(self._group.sharpness) if self._group.combining == "confidence" else None
        entropy_R = None
        for at_RV, multiplier, indices in self._student_at(logits_RV, by_temperature):
            here_R = self._tiles.start(at_RV, multiplier, len(indices))
            entropy_R = here_R if entropy_R is None else entropy_R
            for i in indices:
                weight_R = self.weights[i][part]
                self._take(i, part)
                if weigh is not None:
                    rescale_R, weight_R = weigh(weight_R, self._tiles.teacher_entropy())
                    self._tiles.rescale(rescale_R)
                divergence = self._group.terms[i].divergence or self._plan.divergence
                value_R = self._tiles.add(weight_R, divergence)
                self.values[i][part] = value_R.where(self.weights[i][part] != 0, 0.0)
        if weigh is not None:
            scale_R, final = weigh.finish(torch.stack([weight[part] for weight in self.weights]).sum(0))
            self._tiles.rescale(scale_R)
            for i, weight_R in zip((i for indices in by_temperature.values() for i in indices), final, strict=True):
                self.weights[i][part] = weight_R
        assert entropy_R is not None
        return entropy_R

    def loss(self) -> Tensor:
        """Return the group's part of the loss, over all its positions."""
        total = torch.zeros_like(self._mixture_value).sum()
        if self._group.combining == "mixture":
            return total if not self.weights else total + torch.stack(self.weights).sum(0) @ self._mixture_value
        for weight_n, value_n in zip(self.weights, self.values, strict=True):
            total = total + weight_n @ value_n
        return total

    def _student_at(
        self, logits_RV: Tensor, by_temperature: dict[float, list[int]]
    ) -> Iterator[tuple[Tensor, float, list[int]]]:
        """Yield the student's logits at each temperature: projected once, and scaled."""
        if len(by_temperature) > 1:
            raw_RV = self._project.workspace.get("raw", logits_RV.shape[0], logits_RV.dtype).copy_(logits_RV)
        for i, (temperature, indices) in enumerate(by_temperature.items()):
            if i > 0:
                self._tiles.settle()
                logits_RV.copy_(raw_RV)
            factor = self._plan.temperature / temperature
            at_RV = logits_RV if factor == 1.0 else logits_RV.mul_(factor)
            yield at_RV, self._project.multiplier * factor, indices

    def _mix(self, logits_RV: Tensor, part: slice) -> Tensor:
        """Compare the student with the weighted mean of the teachers' probabilities, formed in log space."""
        entropy_R = self._tiles.start(logits_RV, self._project.multiplier, 1)
        total_R = torch.stack([weight[part] for weight in self.weights]).sum(0)
        divided_R = torch.where(total_R == 0, 1.0, total_R)
        mixed_RV = self._project.workspace.get("mixed", logits_RV.shape[0], logits_RV.dtype).fill_(-torch.inf)
        for i in range(len(self._teachers)):
            weight_R = self.weights[i][part]
            self._take(i, part)
            if self._plan.values:
                value_R = self._tiles.value(self._plan.divergence)
                self.values[i][part] = value_R.where(weight_R != 0, 0.0)
            self._tiles.mix_into(mixed_RV, weight_R / divided_R)
        self._tiles.take(mixed_RV.masked_fill_((total_R == 0).unsqueeze(-1), 0.0))  # else -inf, without a weight
        value_R = self._tiles.add(total_R, self._plan.divergence)
        self._mixture_value[part] = value_R.where(total_R != 0, 0.0)
        return entropy_R

    def _take(self, i: int, part: slice) -> None:
        """Project a teacher and hand it to the tiles."""
        teacher, used_R1 = self._teachers[i], (self.weights[i][part] != 0).unsqueeze(-1)
        hidden_RH = self._group.terms[i].signal.hidden[part].to(teacher.workspace.device, teacher.weight_VH.dtype)
        self._tiles.take(teacher(without_unused(hidden_RH, used_R1)))


class _Confidence:
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


def _weights(term: TeacherTerm, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if term.weights is None:
        return torch.ones(count, dtype=dtype, device=device)
    return term.weights.detach().to(device=device, dtype=dtype, copy=True)
