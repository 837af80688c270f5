"""The divergence of a student from a teacher with another tokenizer, byte by byte of the text that stands there.

After a text x the teacher has a distribution over the next byte. With its tokens y_1 ... of the text known, the
probability that it goes on with byte c is a sum over the token boundaries j at or before the end of x: that of
y_1 ... y_j, times that of all tokens that begin with the bytes of x behind boundary j and with c. This is the exact
byte-level probability of a tokenized model (Phan et al., arXiv 2410.09303) as far as the tokens that stand there show
it. What would follow a token that had ended earlier than the one that stands there is not known, and is one outcome,
the rest.

The student chooses the first byte of each of its tokens, then each byte inside, or that the token ends. Every choice is
compared with the teacher's next byte: over the bytes that both know, and the rest where the student has one, of which
the teacher has a millionth at least: what it cannot say is not free. An end stands for the bytes by which no longer
token goes on, as if the student's tokenizer always took the longest one. Summing over all that a student's text could
be cut into, as on the teacher's side, would leave it free to cut text in ways that it never learned. Byte-level
distillation (Singh et al., arXiv 2604.07466) gives the student a head over bytes instead.

Each tile of the student's logits is compared and its gradient formed while it is there, as in
:mod:`kd_plugin.divergence.fused`: nothing is projected again in backward.

Shape suffixes: N student positions, M teacher positions, R positions of a tile, S steps (bytes that are compared), T
numbered bytes, J = 258 outcomes, H hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.across.byte_masses import Masses, MassTiles, ModelRows, Tile, byte_masses, within
from kd_plugin.divergence.across.sorted_tokens import OUTCOMES, REST, Ranges, SortedTokens
from kd_plugin.divergence.gradient import StudentGradient
from kd_plugin.divergence.projection import (
    autocast_dtype,
    chunks,
    needs_gradient,
    require_finite,
    require_hidden,
    scaled_once,
    statistics_dtype,
    without_unused,
)
from kd_plugin.divergence.reference import IMPOSSIBLE
from kd_plugin.divergence.spec import Block, Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead

_BLOCK = {"cpu": 192}  # steps that are compared at once; so few stay in the caches, and on an accelerator all are
_ABSENT = math.exp(-80.0)  # probability, on both sides, of an outcome that is not compared: it adds nothing


@dataclass(frozen=True)
class Covers:
    """How the tokens of a side lie over bytes.

    Attributes:
        table: the side's vocabulary.
        tokens: (N,) int64 that stand there.
        known: (N,) bool, whether a token's text is known, and with it what follows.
        rows: (n,) int64 those that begin at a byte that counts.
        bytes: (n,) int64 the number of that byte.
        ranges: of the tokens that begin with the text between a row and a later byte, with the byte's number.
        open: (E,) bool, whether it is unknown what follows where a token ends at the end of that text.
    """

    table: SortedTokens
    tokens: Tensor
    known: Tensor
    rows: Tensor
    bytes: Tensor
    ranges: Ranges
    open: Tensor

    def to(self, device: torch.device) -> Covers:
        """Move all to ``device``."""
        tokens, known, rows, numbers = (t.to(device) for t in (self.tokens, self.known, self.rows, self.bytes))
        return Covers(self.table, tokens, known, rows, numbers, self.ranges.to(device), self.open.to(device))


@dataclass(frozen=True)
class ByteSteps:
    """The choices of the student that are compared, and the bytes at which the teacher is.

    A step is the first byte of one of the student's tokens (``student.rows``, in order), or, behind those, what follows
    inside it or at its end (``student.ranges``, in order).

    Attributes:
        student: its own tokens alone.
        teacher: all of its tokens that reach a byte.
        count: T, the numbered bytes.
    """

    student: Covers
    teacher: Covers
    count: int

    @property
    def owner(self) -> Tensor:
        """(S,) int64 the student's position that each step belongs to."""
        return torch.cat([self.student.rows, self.student.ranges.rows])

    def __len__(self) -> int:
        return len(self.student.rows) + len(self.student.ranges)


@dataclass(frozen=True)
class ByteLoss:
    """What :func:`fused_byte_divergence` returns; sums, never means.

    Attributes:
        loss_sum: scalar with a graph, Σ weights·D over steps, in nats.
        values: (N,) nats, each position's part of it before weighting. Detached.
        entropy: (N,) nats, of the student's distribution over its tokens. Detached.
    """

    loss_sum: Tensor
    values: Tensor
    entropy: Tensor


def fused_byte_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    teacher: HiddenSignal,
    steps: ByteSteps,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    _rows: int | None = None,
) -> ByteLoss:
    """Σ w·D over the bytes of a response, where the two models have different tokens.

    Dtypes are as in :func:`~kd_plugin.divergence.fused.fused_panel_divergence`, and so is that backward runs once.

    Args:
        student_hidden: (N, H) last hidden states at the scored positions.
        student_head: the student's head, as autograd knows it.
        teacher: at its M positions.
        steps: what is compared where.
        divergence: which D.
        temperature: divides the logits of both sides.
        weights: (N,) or None for one everywhere. A position of weight 0 adds nothing.

    Raises:
        ConfigError: shapes or the temperature do not fit.
        NonFiniteError: on CPU only, the loss is NaN or infinite.
    """
    require_hidden(student_hidden, temperature)
    count, device = student_hidden.shape[0], student_hidden.device
    if len(steps.student.tokens) != count or len(steps.teacher.tokens) != len(teacher):
        raise ConfigError(
            f"There are {count} positions of the student and {len(teacher)} of the teacher; the steps are over "
            f"{len(steps.student.tokens)} and {len(steps.teacher.tokens)}."
        )
    statistics, autocast = statistics_dtype(student_hidden), autocast_dtype(device)
    theirs = steps.teacher.to(device)
    said = byte_masses(
        ModelRows(
            teacher.hidden.to(device), teacher.head, theirs.table, theirs.tokens, theirs.ranges, temperature,
            statistics, autocast or teacher.hidden.dtype, _rows,
        )
    )  # fmt: skip
    tensors = (student_hidden, student_head.weight, student_head.bias)
    plan = _Plan(
        student_head,
        steps.student.to(device),
        _marginals(said, theirs, steps.count),
        torch.ones(count, dtype=statistics, device=device)
        if weights is None
        else weights.detach().to(device, statistics),
        divergence,
        temperature,
        needs_gradient(*tensors),
        autocast or student_hidden.dtype,
        _rows,
    )
    loss, values, entropy = _ByteFunction.apply(*tensors, plan)
    if loss.device.type == "cpu":
        require_finite(loss, f"The {divergence.name} over bytes")
    return ByteLoss(loss, values, entropy)


@torch.no_grad()
def _marginals(masses: Masses, covers: Covers, count: int) -> Tensor:
    """(T, J) the distribution over the next byte at T bytes, not normalised; 0 where it is not known to go on so.

    It is summed over the token boundaries of the path.
    """
    total_N = masses.first.sum(-1).log()
    token_N = torch.where(covers.known, masses.token - masses.top - total_N, 0.0).double()
    path_N = token_N.cumsum(0) - token_N  # nats of the tokens before
    row_E = covers.ranges.rows
    at_n = path_N[covers.rows] - total_N[covers.rows]
    at_E = path_N[row_E] - total_N[row_E] + masses.after_top - masses.top[row_E]
    byte_A, at_A = torch.cat([covers.bytes, covers.ranges.bytes]), torch.cat([at_n, at_E])
    top_T = at_A.new_full((count,), -torch.inf).scatter_reduce_(0, byte_A, at_A, "amax")
    share_n, share_E = (at_A - top_T[byte_A]).exp().to(total_N.dtype).split([len(covers.rows), len(row_E)])
    mass_TJ = masses.first.new_zeros(count, OUTCOMES)
    mass_TJ.index_add_(0, covers.ranges.bytes, masses.after * share_E.unsqueeze(-1))
    ended_E = torch.where(covers.open, masses.after[:, REST] * share_E, 0.0)
    mass_TJ[:, REST] = masses.first.new_zeros(count).index_add_(0, covers.ranges.bytes, ended_E)
    mass_TJ[:, REST].index_fill_(0, covers.bytes, 0.0)  # a beginning token knows every byte
    return mass_TJ.index_add_(0, covers.bytes, masses.first[covers.rows] * share_n.unsqueeze(-1))


@dataclass(frozen=True)
class _Plan:
    """What autograd does not look into; see :func:`fused_byte_divergence`."""

    head: OutputHead
    covers: Covers
    said_TJ: Tensor
    weights_N: Tensor
    divergence: Divergence
    temperature: float
    needs: tuple[bool, bool, bool]
    dtype: torch.dtype
    rows: int | None


class _ByteFunction(torch.autograd.Function):
    """Forward forms loss and gradient together; backward scales."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        covers, statistics = plan.covers, plan.weights_N.dtype
        used_N = plan.weights_N != 0
        with torch.autocast(hidden_NH.device.type, enabled=False):
            rows = ModelRows(
                without_unused(hidden_NH.detach(), used_N.unsqueeze(-1)), plan.head, covers.table, covers.tokens,
                covers.ranges, plan.temperature, statistics, plan.dtype, plan.rows,
            )  # fmt: skip
            tiles = MassTiles(rows, keep_slope=any(plan.needs))
            gradient = StudentGradient(hidden_NH, weight, bias, tiles.projector, plan.needs, statistics)
            loss, values_N, entropy_N = (plan.weights_N.new_zeros(n) for n in ((), len(used_N), len(used_N)))
            for tile in tiles:
                entropy_N[tile.part] = tile.entropy()
                value_S, owner_S, grads = _compared_tile(tile, plan, tiles.projector.multiplier)
                weight_S = plan.weights_N[owner_S]
                loss += torch.where(weight_S != 0, weight_S * value_S, 0.0).sum()
                values_N.index_add_(0, owner_S, torch.where(weight_S != 0, value_S, 0.0))
                if any(plan.needs):
                    gradient.add(tile.gradient(*grads), tile.hidden, tile.part)
        ctx.gradients = gradient.take()
        ctx.dtypes = tuple(torch.float32 if t is None else t.dtype for t in (hidden_NH, weight, bias))
        entropy_N = torch.where(used_N, entropy_N, 0.0)
        ctx.mark_non_differentiable(values_N, entropy_N)
        return loss, values_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*scaled_once(ctx, grad_loss, ctx.dtypes), None)


def _compared_tile(tile: Tile, plan: _Plan, multiplier: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the divergence at each step of a tile (S,), its position (S,), and the gradient in the tile's masses."""
    covers = plan.covers
    begun, inside = within(covers.rows, tile.part), tile.ranges
    rows_n = covers.rows[begun] - tile.part.start
    owner_S = torch.cat([covers.rows[begun], covers.ranges.rows[inside]])
    at_S = torch.cat([covers.bytes[begun], covers.ranges.bytes[inside]])
    own_SJ = torch.cat([tile.masses.first[rows_n], tile.masses.after])
    factor_S1 = (plan.weights_N[owner_S] * multiplier).unsqueeze(-1)
    value_S = torch.empty_like(factor_S1[:, 0])
    for block in chunks(len(at_S), _BLOCK.get(own_SJ.device.type, max(len(at_S), 1))):
        said_BJ = plan.said_TJ.index_select(0, at_S[block])
        value_S[block], slope_BJ = _compared(own_SJ[block], said_BJ, plan.divergence)
        torch.mul(slope_BJ, factor_S1[block], out=own_SJ[block])
    first_RJ = torch.zeros_like(tile.masses.first).index_copy_(0, rows_n, own_SJ[: len(rows_n)])
    return value_S, owner_S, (first_RJ, own_SJ[len(rows_n) :])


def _compared(own_SJ: Tensor, said_SJ: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(S,) nats D over the outcomes that both sides know, and (S, J) its derivative in the student's masses.

    Outcomes are the bytes that both know, and the rest, which is all else, if the student has one; their masses are
    scaled to sum to one. Flags are numbers: on a CPU a product of two floats takes a fifth of the time of a choice by a
    boolean.
    """
    least = torch.finfo(own_SJ.dtype).tiny
    common_SJ = (torch.minimum(own_SJ, said_SJ) >= least).to(own_SJ.dtype)
    common_SJ[:, REST] = 1.0
    own_SJ, said_SJ = (_folded(mass_SJ, common_SJ) for mass_SJ in (own_SJ, said_SJ))
    said_SJ[:, REST:] = torch.maximum(said_SJ[:, REST:], IMPOSSIBLE * said_SJ.sum(-1, keepdim=True))
    has_rest_S1 = (torch.minimum(own_SJ[:, REST:], said_SJ[:, REST:]) >= least).to(own_SJ.dtype)
    absent_SJ = 1.0 - common_SJ
    absent_SJ[:, REST:] = 1.0 - has_rest_S1
    for mass_SJ in (own_SJ, said_SJ):
        mass_SJ[:, REST:] *= has_rest_S1
    logq_SJ, logp_SJ = (_scaled(mass_SJ, absent_SJ) for mass_SJ in (own_SJ, said_SJ))
    block = Block(logq_SJ.exp(), logq_SJ, logp_SJ, said_SJ, lambda: torch.empty_like(logq_SJ))
    found = divergence.kind.compare(block, divergence)
    slope_SJ, mean_S1 = found.part_BV * found.sign, found.mean_B.unsqueeze(-1)
    if divergence.kind.direct(divergence):
        slope_SJ.addcmul_(block.q_BV, mean_S1).neg_()
    else:
        slope_SJ.sub_(mean_S1).mul_(block.q_BV)
    slope_SJ.div_(own_SJ.add_(absent_SJ))
    return found.value_B, torch.lerp(slope_SJ[:, REST:] * has_rest_S1, slope_SJ, common_SJ)


def _folded(mass_SJ: Tensor, common_SJ: Tensor) -> Tensor:
    """Return the masses with all that is not common in the rest."""
    kept_SJ = mass_SJ * common_SJ
    kept_SJ[:, REST] += (mass_SJ - kept_SJ).sum(-1)
    return kept_SJ


def _scaled(mass_SJ: Tensor, absent_SJ: Tensor) -> Tensor:
    """Return nats of what is present, scaled to sum to one."""
    least = torch.finfo(mass_SJ.dtype).tiny
    share_SJ = mass_SJ / mass_SJ.sum(-1, keepdim=True).clamp_(min=least)
    return share_SJ.add_(absent_SJ, alpha=_ABSENT).clamp_(min=least).log_()
