"""The divergence of a student from a teacher with another tokenizer, byte by byte of the text that stands there.

After a text x the teacher has a distribution over the next byte. With its tokens y_1 ... of the text known, the
probability that it goes on with byte c is a sum over the token boundaries j at or before the end of x: that of
y_1 ... y_j, times that of all tokens that begin with the bytes of x behind boundary j and with c. This is the exact
byte-level probability of a tokenized model (Phan et al., arXiv 2410.09303) as far as the tokens that stand there show
it. What would follow a token that had ended earlier than the one that stands there is not known, and is one outcome,
the rest.

The student chooses the first byte of each of its tokens, then each byte inside, or that the token ends. Every choice is
compared with the teacher's next byte: over the bytes that both know, and the rest where both have one. An end stands
for the bytes by which no longer token goes on, as if the student's tokenizer always took the longest one. Summing over
all that a student's text could be cut into, as on the teacher's side, would leave it free to cut text in ways that it
never learned. Byte-level distillation (Singh et al., arXiv 2604.07466) gives the student a head over bytes instead.

Shape suffixes: N student positions, M teacher positions, S steps (bytes that are compared), C = 257 symbols,
J = 258 outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.across.byte_masses import END, SYMBOLS, Masses, Ranges, SortedTokens, byte_masses
from kd_plugin.divergence.projection import (
    autocast_dtype,
    needs_gradient,
    require_finite,
    require_hidden,
    statistics_dtype,
    without_unused,
)
from kd_plugin.divergence.reference import from_logprobs
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead

_ABSENT = -80.0  # nats, on both sides, of an outcome that is not compared: it adds nothing


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

    Dtypes are as in :func:`~kd_plugin.divergence.fused.fused_panel_divergence`.

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
    used_N = torch.ones(count, dtype=torch.bool, device=device) if weights is None else weights.to(device) != 0
    hidden = without_unused(student_hidden, used_N.unsqueeze(-1))
    mine, theirs = steps.student.to(device), steps.teacher.to(device)
    needs = needs_gradient(student_hidden, student_head.weight, student_head.bias)
    student = byte_masses(
        hidden, student_head, mine.table, mine.tokens, mine.ranges, temperature, needs, statistics,
        autocast or hidden.dtype, _rows,
    )  # fmt: skip
    with torch.no_grad():
        said = byte_masses(
            teacher.hidden.to(device), teacher.head, theirs.table, theirs.tokens, theirs.ranges, temperature,
            (False, False, False), statistics, autocast or teacher.hidden.dtype, _rows,
        )  # fmt: skip
        at_S = torch.cat([mine.bytes, mine.ranges.bytes])
        known = _marginals(said, theirs, steps.count, statistics).select(at_S)
    with torch.autocast(device.type, enabled=False):
        chosen_SC = torch.cat([student.first[mine.rows], torch.nn.functional.pad(student.after[:, :END], (0, 1))])
        ended_S = torch.cat([chosen_SC.new_zeros(len(mine.rows)), student.after[:, END]])
        value_S = _Compared.apply(chosen_SC, ended_S, known, divergence)
        owner_S = steps.owner.to(device)
        weights_N = used_N.to(statistics) if weights is None else weights.detach().to(device, statistics)
        weight_S = weights_N[owner_S]
        loss = torch.where(weight_S != 0, weight_S * value_S, 0.0).sum()
    values = torch.zeros(count, dtype=statistics, device=device)
    values.index_add_(0, owner_S, torch.where(weight_S != 0, value_S.detach(), 0.0))
    if loss.device.type == "cpu":
        require_finite(loss, f"The {divergence.name} over bytes")
    return ByteLoss(loss, values, torch.where(used_N, student.entropy, 0.0))


@dataclass(frozen=True)
class _Marginals:
    """A model's distribution over the next byte, at T bytes, as far as it is known.

    Attributes:
        mass: (T, 257) not normalised; 0 where no token goes on so.
        rest: (T,) mass of what ends there, of which it is not known what follows.
    """

    mass: Tensor
    rest: Tensor

    def select(self, at: Tensor) -> _Marginals:
        return _Marginals(self.mass.index_select(0, at), self.rest.index_select(0, at))


def _marginals(masses: Masses, covers: Covers, count: int, dtype: torch.dtype) -> _Marginals:
    """Sum over the token boundaries of the path."""
    total_N = masses.first.sum(-1).log()
    token_N = torch.where(covers.known, masses.token - masses.top - total_N, 0.0).double()
    path_N = token_N.cumsum(0) - token_N  # nats of the tokens before
    row_E = covers.ranges.rows
    at_n = path_N[covers.rows] - total_N[covers.rows]
    at_E = path_N[row_E] - total_N[row_E] + masses.after_top - masses.top[row_E]
    byte_A, at_A = torch.cat([covers.bytes, covers.ranges.bytes]), torch.cat([at_n, at_E])
    top_T = at_A.new_full((count,), -torch.inf).scatter_reduce_(0, byte_A, at_A, "amax")
    share_n, share_E = (at_A - top_T[byte_A]).exp().to(dtype).split([len(covers.rows), len(row_E)])
    followed_EC = torch.nn.functional.pad(masses.after[:, :END], (0, 1))
    mass_TC = masses.first.new_zeros(count, SYMBOLS)
    mass_TC.index_add_(0, covers.bytes, masses.first[covers.rows] * share_n.unsqueeze(-1))
    mass_TC.index_add_(0, covers.ranges.bytes, followed_EC * share_E.unsqueeze(-1))
    ended_E = torch.where(covers.open, masses.after[:, END] * share_E, 0.0)
    rest_T = masses.first.new_zeros(count).index_add_(0, covers.ranges.bytes, ended_E)
    return _Marginals(mass_TC, rest_T.index_fill_(0, covers.bytes, 0.0))  # a beginning token knows every byte


class _Compared(torch.autograd.Function):
    """(S,) nats D over the outcomes that both sides know, with its derivative in the student's masses.

    Outcomes are the bytes that both know, and the rest if both have one; their masses are scaled to sum to one.
    """

    @staticmethod
    def forward(ctx: Any, mass_SC: Tensor, rest_S: Tensor, teacher: _Marginals, divergence: Divergence) -> Tensor:
        both_SC = (mass_SC > 0) & (teacher.mass > 0)
        own_SJ, present_SJ = _folded(mass_SC, rest_S, both_SC)
        said_SJ, has_rest_SJ = _folded(teacher.mass, teacher.rest, both_SC)
        present_SJ &= has_rest_SJ
        logq_SJ, logp_SJ = (_scaled(one, present_SJ) for one in (own_SJ, said_SJ))
        with torch.enable_grad():
            leaf_SJ = logq_SJ.requires_grad_()
            value_S = from_logprobs(leaf_SJ, logp_SJ, divergence)
            (slope_SJ,) = torch.autograd.grad(value_S.sum(), leaf_SJ)
        logq_SJ = logq_SJ.detach()
        slope_SJ = slope_SJ - logq_SJ.exp() * slope_SJ.sum(-1, keepdim=True)
        slope_SJ = torch.where(present_SJ, slope_SJ / torch.where(present_SJ, own_SJ, 1.0), 0.0)
        ctx.save_for_backward(torch.where(both_SC, slope_SJ[:, :-1], slope_SJ[:, -1:]), slope_SJ[:, -1])
        return value_S.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        slope_SC, slope_S = ctx.saved_tensors
        return grad_S.unsqueeze(-1) * slope_SC, grad_S * slope_S, None, None


def _folded(mass_SC: Tensor, rest_S: Tensor, both_SC: Tensor) -> tuple[Tensor, Tensor]:
    """Return (S, J) masses of the common bytes and of all else as one, and which of them there are."""
    common_SC = mass_SC * both_SC
    rest_S1 = (rest_S + (mass_SC - common_SC).sum(-1)).unsqueeze(-1)
    return torch.cat([common_SC, rest_S1], -1), torch.cat([both_SC, rest_S1 > 0], -1)


def _scaled(mass_SJ: Tensor, present_SJ: Tensor) -> Tensor:
    """Return nats that sum to one over what is present."""
    log_SJ = mass_SJ.clamp(min=torch.finfo(mass_SJ.dtype).tiny).log_().masked_fill_(~present_SJ, -torch.inf)
    norm_S1 = log_SJ.logsumexp(-1, keepdim=True)
    return log_SJ.sub_(torch.where(norm_S1 == -torch.inf, 0.0, norm_S1)).masked_fill_(~present_SJ, _ABSENT)
