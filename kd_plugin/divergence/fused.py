"""Divergence from a panel of teachers without full logits, with the gradient formed in the same pass.

Each chunk of student hidden states is projected once, whatever the number of teachers. Logits exist for one chunk at
a time, and nothing is projected again in backward: the gradient with respect to hidden states and head is ready when
the loss is, and backward only multiplies it by the incoming scalar.

Shape suffixes: N positions of the batch, n positions of a group, R positions of a chunk, V tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.across.folding import Comparisons, require_shared_rows
from kd_plugin.divergence.compiled.first_use import compiles
from kd_plugin.divergence.compiled.tiles import CompiledTiles
from kd_plugin.divergence.gradient import StudentGradient, kept_rows
from kd_plugin.divergence.modes import MODES, PanelGroup, TeacherTerm, check_groups, head_identity, merged_by_head
from kd_plugin.divergence.projection import (
    Projector,
    Workspace,
    autocast_dtype,
    chunk_rows,
    chunks,
    needs_gradient,
    require_finite,
    require_hidden,
    require_matching_rows,
    scaled_once,
    statistics_dtype,
    without_unused,
)
from kd_plugin.divergence.spec import Divergence
from kd_plugin.divergence.tiles import Tiles
from kd_plugin.signals import OutputHead

__all__ = ["PanelGroup", "PanelLoss", "TeacherTerm", "fused_panel_divergence"]


@dataclass(frozen=True)
class LossPlan:
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
    compiled: bool = False  # whether the passes over a chunk's logits are compiled


@dataclass(frozen=True)
class PassSums:
    """What a pass leaves: the loss, entropy (N,), per group and term value and weight (n,), and the gradients."""

    loss: Tensor
    entropy_N: Tensor
    values: list[Tensor]
    weights: list[Tensor]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def panel_pass(hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, student: OutputHead, plan: LossPlan) -> PassSums:
    """Compute everything; ``student`` is the head's real rows, ``weight`` and ``bias`` are autograd's."""
    device, statistics, dtype = hidden_NH.device, plan.statistics, plan.autocast or hidden_NH.dtype
    vocab_size, need_grad = student.weight.shape[0], any(plan.needs)
    rows = plan.rows or chunk_rows(vocab_size, device)
    workspace = Workspace(min(rows, max(hidden_NH.shape[0], 1)), vocab_size, device)
    project = Projector(student, "student", workspace, dtype, statistics, plan.temperature, keep_slope=need_grad)
    kept = kept_rows(rows, device, groups=len(plan.groups), compiled=plan.compiled)
    gradient = StudentGradient(hidden_NH, weight, bias, project, plan.needs, statistics, kept)
    comparisons = Comparisons(workspace, statistics, need_grad, plan.compiled)
    entropy_N = torch.zeros(hidden_NH.shape[0], dtype=statistics, device=device)
    loss, values, weights = torch.zeros((), dtype=statistics, device=device), [], []
    for group in plan.groups:
        count = hidden_NH.shape[0] if group.positions is None else group.positions.shape[0]
        teachers = _projectors(group, student, workspace, plan)
        walk = GroupPass(group, teachers, project, comparisons, plan, count)
        for part in chunks(count if teachers else 0, rows):
            where = part if group.positions is None else group.positions[part]
            used_R = torch.stack([weight[part] != 0 for weight in walk.weights]).any(0)
            hidden_RH = without_unused(hidden_NH.detach()[where].to(dtype), used_R.unsqueeze(-1))
            entropy_N[where] = walk.chunk(hidden_RH, part).where(used_R, 0.0)
            if need_grad:
                gradient.add(walk.gradient(gradient.room(hidden_RH)), hidden_RH, where)
        loss.add_(walk.loss())
        values.extend(walk.values)
        weights.extend(walk.weights)
    return PassSums(loss, entropy_N, values, weights, gradient.take())


def _projectors(group: PanelGroup, student: OutputHead, workspace: Workspace, plan: LossPlan) -> list[Projector]:
    """Bring the heads of a group to the dtype of the product, each once."""
    projectors = []
    ready: dict[object, tuple[OutputHead, Workspace]] = {}
    for term in group.terms:
        dtype, shared = plan.autocast or term.signal.hidden.dtype, term.signal.shared
        key = (head_identity(term.signal.head), dtype)
        if key not in ready:
            head = term.signal.head.real_rows()
            if shared is None:
                require_matching_rows(student, head, "a teacher of the panel")
            else:
                require_shared_rows(student, head, shared)
            size = head.weight.shape[0]
            own = workspace if shared is None else Workspace(workspace.rows, size, workspace.device)
            ready[key] = replace(head, weight=head.weight.detach().to(workspace.device, dtype)), own
        temperature = plan.temperature if term.temperature is None else term.temperature
        head, own = ready[key]
        projectors.append(Projector(head, "teacher", own, dtype, plan.statistics, temperature))
    return projectors


class GroupPass:
    """The chunks of one group, and the values and weights of its terms, filled chunk by chunk.

    Attributes:
        teachers: the group's, in the order of its terms.
        plan: of the whole loss.
        sharpness: of the group.
        weights: for each term (n,), replaced where the mode forms its own.
        values: for each term (n,) divergence in nats.
        joint_value: (n,) divergence in nats from what a mode makes of all terms.
        confidences: of the present chunk, for that mode.
    """

    confidences: Any

    def __init__(
        self,
        group: PanelGroup,
        teachers: Sequence[Projector],
        project: Projector,
        comparisons: Comparisons,
        plan: LossPlan,
        count: int,
    ) -> None:
        self._group, self.teachers, self.plan = group, teachers, plan
        self._project, self._mode, self.sharpness = project, MODES[group.combining], group.sharpness
        device = self._project.workspace.device
        self.weights = [_weights(term, count, plan.statistics, device) for term in group.terms]
        self.values = [torch.zeros(count, dtype=plan.statistics, device=device) for _ in group.terms]
        self.joint_value = torch.zeros(count, dtype=plan.statistics, device=device)
        self._compared = [comparisons.over(term.signal.shared, least) for term, least in _rests(group, plan.divergence)]
        self._alike: dict[tuple[float, int], list[int]] = {}
        for i, term in enumerate(group.terms):
            temperature = plan.temperature if term.temperature is None else term.temperature
            self._alike.setdefault((temperature, id(self._compared[i][0])), []).append(i)
        self._earlier_RV: Tensor | None = None  # gradient of the teachers before those of the present comparison

    @property
    def tiles(self) -> Tiles | CompiledTiles:
        """Compares two distributions and holds the gradient of the present comparison."""
        return self._present.tiles

    def chunk(self, hidden_RH: Tensor, part: slice) -> Tensor:
        """Compare the student with every teacher at the positions of ``part``; return its entropy (R,)."""
        return self._mode.chunk(self, self._project(hidden_RH), part)

    def loss(self) -> Tensor:
        """Return the group's part of the loss, over all its positions."""
        return self._mode.loss(self)

    def order(self) -> list[int]:
        """Return the terms in the order of :meth:`by_comparison`."""
        return [i for indices in self._alike.values() for i in indices]

    def by_comparison(self, logits_RV: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
        """Start the tiles for teachers that are compared alike: at one temperature, over the same outcomes.

        The student is projected once. Yields its entropy (R,) and the terms.
        """
        if len(self._alike) > 1:
            raw_RV = self._project.workspace.get("raw", logits_RV.shape[0], logits_RV.dtype).copy_(logits_RV)
        for i, ((temperature, _), indices) in enumerate(self._alike.items()):
            if i > 0:
                self._put_aside()
                logits_RV.copy_(raw_RV)
            factor = self.plan.temperature / temperature
            self._present, self._logits_RV = self._compared[indices[0]][0], logits_RV
            at_RV = logits_RV if factor == 1.0 else logits_RV.mul_(factor)
            yield self._present.start(at_RV, self._project.multiplier * factor, len(indices)), indices

    def start_joint(self, logits_RV: Tensor) -> Tensor:
        """Start the tiles for all teachers as one distribution; return the student's entropy (R,)."""
        self._present, self._logits_RV = self._compared[0][0], logits_RV
        return self._present.start(logits_RV, self._project.multiplier, 1)

    def take(self, i: int, part: slice) -> None:
        """Project a teacher and hand it to the tiles."""
        teacher, used_R1 = self.teachers[i], (self.weights[i][part] != 0).unsqueeze(-1)
        hidden_RH = self._group.terms[i].signal.hidden[part].to(teacher.workspace.device, teacher.weight_VH.dtype)
        self._present.take(teacher(without_unused(hidden_RH, used_R1)), self._compared[i][1])

    def add(self, i: int, part: slice, weight_R: Tensor) -> None:
        """Add the teacher that was taken in last to the loss, by its own divergence."""
        value_R = self.tiles.add(weight_R, self._group.terms[i].divergence or self.plan.divergence)
        self.values[i][part] = value_R.where(self.weights[i][part] != 0, 0.0)

    def rescale(self, factor_R: Tensor) -> None:
        """Multiply the weights of all teachers so far."""
        self.tiles.rescale(factor_R)
        if self._earlier_RV is not None:
            self._earlier_RV.mul_(factor_R.unsqueeze(-1))

    def gradient(self, room_RV: Tensor | None) -> Tensor:
        """(R, V) gradient of Σ w·D in the student's projection; ends the chunk and overwrites its buffers.

        It is written to ``room_RV`` where that is given and nothing more has to be added.
        """
        earlier_RV, self._earlier_RV = self._earlier_RV, None
        if earlier_RV is None:
            return self._present.gradient(self._logits_RV, room_RV)
        return earlier_RV.add_(self._present.gradient(self._logits_RV))

    def _put_aside(self) -> None:
        """Keep the gradient so far, before the memory of the student's logits is written again."""
        if not any(self.plan.needs):
            return
        gradient_RV = self._present.gradient(self._logits_RV)
        if self._earlier_RV is None:
            buffer = self._project.workspace.get("finished", gradient_RV.shape[0], gradient_RV.dtype)
            self._earlier_RV = buffer.copy_(gradient_RV)
        else:
            self._earlier_RV.add_(gradient_RV)


def _rests(group: PanelGroup, divergence: Divergence) -> Iterator[tuple[TeacherTerm, float | None]]:
    """Yield each term, and the least probability of its tokens that are not shared; None if they are no outcome."""
    together = [term.signal.shared for term in group.terms if term.signal.shared is not None]
    for term in group.terms:
        joint = MODES[group.combining].one_divergence
        own = [] if term.signal.shared is None else together if joint else [term.signal.shared]
        student, teacher = any(one.student_has_rest for one in own), any(one.teacher_has_rest for one in own)
        yield term, (term.divergence or divergence).least_rest(student, teacher)


def _weights(term: TeacherTerm, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if term.weights is None:
        return torch.ones(count, dtype=dtype, device=device)
    return term.weights.detach().to(device=device, dtype=dtype, copy=True)


@dataclass(frozen=True)
class PanelLoss:
    """What :func:`fused_panel_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, in nats: the sum over positions of what the groups' combining says.
        entropy: (N,) nats, of the student's distribution at the temperature of the position's first teacher, and over
            the outcomes on which that is compared; 0 at positions of no group, or where every weight is 0. Detached.
        divergences: for each group, for each term, (n,) nats before weighting; 0 where the weight is 0. Without
            values, nothing for any group. Detached.
        weights: for each group, for each term, (n,) the weights that were used, those of ``confidence`` included.
            Empty as ``divergences`` is. Detached.
    """

    loss_sum: Tensor
    entropy: Tensor
    divergences: tuple[tuple[Tensor, ...], ...]
    weights: tuple[tuple[Tensor, ...], ...]


@torch.compiler.disable
def fused_panel_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    groups: Sequence[PanelGroup],
    divergence: Divergence,
    temperature: float = 1.0,
    *,
    values: bool = True,
    _rows: int | None = None,
) -> PanelLoss:
    """Σ over positions of the panel's divergence from the student, with its gradient, in one pass.

    Matrix products run in autocast's dtype where autocast is on, else in the dtype of the hidden states; softmax
    statistics and gradient sums in float32 (float64 for float64 inputs). Gradients come back in the dtypes of the
    inputs. Only what requires a gradient gets one; without grad mode none is computed.

    Backward runs once: it scales the gradient in place. It cannot be differentiated again.

    Args:
        student_hidden: (N, H) last hidden states at the scored positions.
        student_head: the student's head, as autograd knows it (a parameter, a ZeRO-3 parameter, a DTensor).
        groups: disjoint groups of positions with their teachers; may be empty.
        divergence: which divergence.
        temperature: divides the logits of both sides; the loss is not multiplied by its square.
        values: False leaves out what only a log needs. The gradient is the same. Where teachers of a ``sum`` share
            one head and the divergence is ``reverse_kl``, they are projected once, all together (see ``shared``),
            and ``loss_sum`` is then a lower bound of the loss.

    Returns:
        PanelLoss.

    Raises:
        ConfigError: shapes, vocabulary sizes or the temperature do not fit.
        NonFiniteError: on CPU only, the loss is NaN or infinite. On an accelerator the host checks with
            ``require_finite`` when it reads the loss, because reading it here would make the device wait.
    """
    require_hidden(student_hidden, temperature)
    check_groups(student_hidden, groups)
    if not values:
        groups = [merged_by_head(group, divergence) for group in groups]
    tensors = (student_hidden, student_head.weight, student_head.bias)
    needs = needs_gradient(*tensors)
    plan = LossPlan(
        student_head,
        tuple(groups),
        divergence,
        float(temperature),
        needs,
        statistics_dtype(student_hidden),
        autocast_dtype(student_hidden.device),
        values,
        _rows,
    )
    loss_sum, entropy, *flat = _PanelFunction.apply(*tensors, plan)
    if loss_sum.device.type == "cpu":
        require_finite(loss_sum, f"The {divergence.name} of the panel")
    if not values:
        return PanelLoss(loss_sum, entropy, tuple(() for _ in groups), tuple(() for _ in groups))
    found = iter(flat)
    divergences, weights = (
        tuple(tuple(next(found) for _ in group.terms) for group in groups) for _ in ("divergences", "weights")
    )
    return PanelLoss(loss_sum, entropy, divergences, weights)


class _PanelFunction(torch.autograd.Function):
    """Forward forms loss and gradient together; backward scales."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: LossPlan) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            student = plan.student.real_rows()

            def run(plan: LossPlan) -> PassSums:
                return panel_pass(hidden_NH, weight, bias, student, plan)

            found = run(replace(plan, compiled=compiles(plan, hidden_NH, student.weight, run)))
        ctx.gradients = found.gradients
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        details = (found.entropy_N, *found.values, *found.weights) if plan.values else (found.entropy_N,)
        ctx.mark_non_differentiable(*details)
        return (found.loss, *details)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)
