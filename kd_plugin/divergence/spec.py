"""The divergences: one class each, with its name, its parameters, its formula and its part of the fused loss.

A new divergence is a class here, listed in ``KINDS``. Its formula is enough: the fused loss differentiates it block by
block. The four below also state value and gradient in a form that writes to memory which is there already.

Shape suffixes: N positions, B positions of a block, V tokens.
"""

# ruff: noqa: D102  the methods are documented in Kind

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kd_plugin.divergence.reference import IMPOSSIBLE, kl
from kd_plugin.errors import ConfigError
from kd_plugin.settings import option, require_known, settings


@dataclass(frozen=True)
class Divergence:
    """Which divergence D(teacher, student) a loss minimises.

    Attributes:
        name: one of ``KINDS``: ``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_kl``.
        beta: weight of the teacher in ``jsd``, strictly between 0 and 1.
        alpha: share of the teacher in ``skew_kl``'s mixture, in [0, 1).

    Raises:
        ConfigError: an unknown name, or a parameter out of range.
    """

    name: str = "reverse_kl"
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        require_known("divergence", self.name, NAMES)
        self.kind.check(self)

    @property
    def kind(self) -> Kind:
        """The formula and what belongs to it."""
        return KINDS[self.name]

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters that this divergence has, by name."""
        return {name: getattr(self, name) for name in self.kind.parameters}

    def least_rest(self, student: bool, teacher: bool) -> float | None:
        """Return the least probability that a teacher gives to the tokens that are not shared; None for no outcome.

        They are no outcome where neither side has any, and where D is infinite for a student that has none. They are
        ``IMPOSSIBLE`` at least where D is infinite for a student that uses its own and the teacher has none.

        Args:
            student: whether the student has tokens that the teacher has not.
            teacher: whether the teacher has tokens that the student has not.
        """
        if not student and (not teacher or self.kind.covers_teacher(self)):
            return None
        return IMPOSSIBLE if not teacher and self.kind.covers_student(self) else 0.0

    @classmethod
    def from_beta(cls, beta: float) -> Divergence:
        """Translate TRL's ``beta``: 0 is the forward KL, 1 the reverse KL, between them the JSD."""
        if beta == 0.0:
            return cls("forward_kl")
        return cls("reverse_kl") if beta == 1.0 else cls("jsd", beta=beta)


@settings
class DivergenceSettings:
    """Parameters of divergences; a base of the settings that name one."""

    skew_alpha: float = option(default=0.1, help="Share of the teacher in skew_kl's mixture, in [0, 1).")

    def chosen_divergence(self, name: str, *, beta: float) -> Divergence:
        """Return the divergence ``name`` with its parameters; ``beta`` is that of ``jsd``.

        Raises:
            ConfigError: an unknown name, or a parameter out of range.
        """
        require_known("divergence", name, NAMES)
        own = {parameter: getattr(self, setting) for parameter, setting in KINDS[name].options.items()}
        return Divergence(name, **own) if name != "jsd" else Divergence(name, beta=beta)


@dataclass(frozen=True)
class Block:
    """The two distributions at some positions, as the fused loss has them.

    Attributes:
        q_BV: probabilities of the student.
        logq_BV: their logarithms, in nats.
        logp_BV: log-probabilities of the teacher, in nats; may be overwritten.
        spare_BV: memory that may be overwritten.
        scratch: returns more of it.
    """

    q_BV: Tensor
    logq_BV: Tensor
    logp_BV: Tensor
    spare_BV: Tensor
    scratch: Callable[[], Tensor]


@dataclass(frozen=True)
class Compared:
    """What a divergence is at some positions, and its gradient: q·(a − ⟨q, a⟩) in the student's logits, a = ∂D/∂q.

    Attributes:
        value_B: in nats.
        part_BV: a up to the sign; of a ``direct`` divergence −q·a in its place. In memory that the next block
            overwrites.
        sign: what ``part_BV`` is multiplied by.
        mean_B: ⟨q, a⟩.
    """

    value_B: Tensor
    part_BV: Tensor
    sign: float
    mean_B: Tensor


class Kind:
    """One divergence; a subclass states at least its name and its formula.

    One that also states :meth:`cells` is compiled where a compiler is there.

    Attributes:
        name: as users write it.
        meaning: what it is, for help.
        parameters: which parameters of :class:`Divergence` it has.
        options: those that a field of :class:`DivergenceSettings` sets, with the name of the field.
        scratch: whether :meth:`compare` calls ``Block.scratch``; ``kd-plugin plan`` counts it.
    """

    name: ClassVar[str]
    meaning: ClassVar[str] = ""
    parameters: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, str]] = {}
    scratch: ClassVar[bool] = False

    def check(self, divergence: Divergence) -> None:
        """Refuse parameters out of range by a ConfigError."""

    def formula(self, logq_NV: Tensor, logp_NV: Tensor, divergence: Divergence) -> Tensor:
        """Return D (N,) in nats from log-probabilities (N, V) of the student and of the teacher, for autograd."""
        raise NotImplementedError

    def direct(self, divergence: Divergence) -> bool:
        """Whether :meth:`compare` gives −q·a: a itself may be larger than any number where the student has no mass."""
        return True

    def covers_teacher(self, divergence: Divergence) -> bool:
        """Whether D is infinite where the teacher has mass and the student none."""
        return True

    def covers_student(self, divergence: Divergence) -> bool:
        """Whether D is infinite where the student has mass and the teacher none."""
        return True

    def compare(self, block: Block, divergence: Divergence) -> Compared:
        """Return value and gradient at a block of positions, by autograd through the formula."""
        with torch.enable_grad():
            leaf_BV = block.logq_BV.detach().requires_grad_()
            value_B = self.formula(leaf_BV, block.logp_BV, divergence)
            (slope_BV,) = torch.autograd.grad(value_B.sum(), leaf_BV)  # q·a
        return Compared(value_B.detach(), slope_BV, -1.0, slope_BV.sum(-1))

    def cells(self, logq: Tensor, logp: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each token adds to the value and to ⟨q, a⟩, and its a, of a ``direct`` divergence −q·a.

        Pure and elementwise, for a compiler to fuse. A token without probability adds 0, as in :meth:`formula`.
        """
        raise NotImplementedError

    @property
    def has_cells(self) -> bool:
        """Whether it states :meth:`cells`."""
        return type(self).cells is not Kind.cells


class ForwardKL(Kind):
    """KL(p ‖ q): covers all that the teacher might say."""

    name = "forward_kl"
    meaning = "KL(teacher || student)"

    def formula(self, logq_NV: Tensor, logp_NV: Tensor, divergence: Divergence) -> Tensor:
        return kl(logp_NV, logq_NV)

    def covers_student(self, divergence: Divergence) -> bool:
        return False

    def compare(self, block: Block, divergence: Divergence) -> Compared:
        p_BV = torch.exp(block.logp_BV, out=block.spare_BV)
        value_B = block.logp_BV.sub_(block.logq_BV).mul_(p_BV).sum(-1)
        return Compared(value_B, p_BV, 1.0, torch.full_like(value_B, -1.0))

    def cells(self, logq: Tensor, logp: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        p = logp.exp()
        return _times(p, logp - logq), -p, p


class ReverseKL(Kind):
    """KL(q ‖ p): punishes what the teacher would not say."""

    name = "reverse_kl"
    meaning = "KL(student || teacher)"

    def formula(self, logq_NV: Tensor, logp_NV: Tensor, divergence: Divergence) -> Tensor:
        return kl(logq_NV, logp_NV)

    def covers_teacher(self, divergence: Divergence) -> bool:
        return False

    def direct(self, divergence: Divergence) -> bool:
        return False

    def compare(self, block: Block, divergence: Divergence) -> Compared:
        gap_BV = block.logp_BV.sub_(block.logq_BV)  # log p − log q
        value_B = torch.mul(block.q_BV, gap_BV, out=block.spare_BV).sum(-1).neg_()
        return Compared(value_B, gap_BV, -1.0, value_B)

    def cells(self, logq: Tensor, logp: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        gap = logq - logp
        value = _times(logq.exp(), gap)
        return value, value, gap


class JSD(Kind):
    """β·KL(p ‖ m) + (1−β)·KL(q ‖ m) with m = β·p + (1−β)·q, as TRL's ``beta``.

    Agarwal et al., "On-Policy Distillation of Language Models", arXiv 2306.13649, eq. 1.
    """

    name = "jsd"
    parameters = ("beta",)
    scratch = True

    def check(self, divergence: Divergence) -> None:
        if not 0.0 < divergence.beta < 1.0:
            raise ConfigError(
                f"jsd needs beta strictly between 0 and 1, got {divergence.beta}. For beta=0 use forward_kl, "
                "for beta=1 use reverse_kl."
            )

    def formula(self, logq_NV: Tensor, logp_NV: Tensor, divergence: Divergence) -> Tensor:
        beta = divergence.beta
        log_mixture = torch.logaddexp(logp_NV + math.log(beta), logq_NV + math.log1p(-beta))
        return beta * kl(logp_NV, log_mixture) + (1.0 - beta) * kl(logq_NV, log_mixture)

    def covers_teacher(self, divergence: Divergence) -> bool:
        return False

    def covers_student(self, divergence: Divergence) -> bool:
        return False

    def direct(self, divergence: Divergence) -> bool:
        return False

    def compare(self, block: Block, divergence: Divergence) -> Compared:
        beta = divergence.beta
        p_BV = torch.exp(block.logp_BV, out=block.spare_BV)
        gap_BV = block.logp_BV.sub_(block.logq_BV)
        rise_BV = _log_mixture_over_q(gap_BV, beta, block.scratch())
        teacher_B = gap_BV.sub_(rise_BV).mul_(p_BV).sum(-1) * beta
        student_B = torch.mul(block.q_BV, rise_BV, out=block.spare_BV).sum(-1) * (beta - 1.0)
        return Compared(teacher_B + student_B, rise_BV, beta - 1.0, student_B)

    def cells(self, logq: Tensor, logp: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        beta = divergence.beta
        above_p, above_q = _mixture_above(logq, logp, beta)
        slope = above_q * (beta - 1.0)
        student = _times(logq.exp(), slope)
        return student - _times(logp.exp(), above_p) * beta, student, slope


class SkewKL(Kind):
    """KL(p ‖ α·p + (1−α)·q), bounded where q is tiny; ``alpha=0`` is the forward KL.

    Ko et al., "DistiLLM", arXiv 2402.03898, eq. 3.
    """

    name = "skew_kl"
    parameters = ("alpha",)
    options: ClassVar[Mapping[str, str]] = {"alpha": "skew_alpha"}
    scratch = True

    def check(self, divergence: Divergence) -> None:
        if not 0.0 <= divergence.alpha < 1.0:
            raise ConfigError(f"skew_kl needs alpha in [0, 1), got {divergence.alpha}.")

    def formula(self, logq_NV: Tensor, logp_NV: Tensor, divergence: Divergence) -> Tensor:
        alpha = divergence.alpha
        if alpha == 0.0:
            return kl(logp_NV, logq_NV)
        return kl(logp_NV, torch.logaddexp(logp_NV + math.log(alpha), logq_NV + math.log1p(-alpha)))

    def covers_teacher(self, divergence: Divergence) -> bool:
        return divergence.alpha == 0.0

    def covers_student(self, divergence: Divergence) -> bool:
        return False

    def direct(self, divergence: Divergence) -> bool:
        return divergence.alpha == 0.0

    def compare(self, block: Block, divergence: Divergence) -> Compared:
        alpha = divergence.alpha
        if alpha == 0.0:
            return KINDS["forward_kl"].compare(block, divergence)
        p_BV = torch.exp(block.logp_BV, out=block.spare_BV)
        gap_BV = block.logp_BV.sub_(block.logq_BV)
        ratio_BV = gap_BV.sub_(_log_mixture_over_q(gap_BV, alpha, block.scratch()))  # log p − log m
        value_B = p_BV.mul_(ratio_BV).sum(-1)
        slope_B = torch.mul(block.q_BV, ratio_BV.exp_(), out=block.spare_BV).sum(-1) * (alpha - 1.0)
        return Compared(value_B, ratio_BV, alpha - 1.0, slope_B)

    def cells(self, logq: Tensor, logp: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        alpha = divergence.alpha
        if alpha == 0.0:
            return KINDS["forward_kl"].cells(logq, logp, divergence)
        above_p, _ = _mixture_above(logq, logp, alpha)
        slope = (-above_p).exp() * (alpha - 1.0)  # p/m is at most 1/alpha
        return -_times(logp.exp(), above_p), _times(logq.exp(), slope), slope


KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (ForwardKL(), ReverseKL(), JSD(), SkewKL())}
NAMES = tuple(KINDS)


def choices(beta: str) -> str:
    """Return the names that a setting may have, with what they mean; ``beta`` is what that of ``jsd`` is called."""
    found = []
    for name, kind in KINDS.items():
        own = [kind.options.get(parameter, beta) for parameter in kind.parameters]
        with_own = f" (with {', '.join(f'`{one}`' for one in own)})" if own else ""
        found.append(name + (f" = {kind.meaning}" if kind.meaning else "") + with_own)
    return ", ".join(found[:-1]) + " or " + found[-1]


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    """Return the product, and 0 where the probability is 0, whatever the factor is there."""
    return torch.where(probability == 0.0, 0.0, probability * factor)


def _mixture_above(logq: Tensor, logp: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return log m − log p and log m − log q with m = share·p + (1−share)·q."""
    gap = logp - logq
    to_p, to_q = gap + math.log(share), math.log1p(-share)
    above_q = to_p.clamp(min=to_q) + (-(to_p - to_q).abs()).exp().log1p()
    return torch.where(gap == math.inf, math.log(share), above_q - gap), above_q


def _log_mixture_over_q(gap_BV: Tensor, share: float, out_BV: Tensor) -> Tensor:
    """log(share·p + (1−share)·q) − log q, from log p − log q."""
    rest = torch.tensor(math.log1p(-share), dtype=gap_BV.dtype, device=gap_BV.device)
    shifted_BV = torch.add(gap_BV, math.log(share), out=out_BV)
    return torch.logaddexp(shifted_BV, rest, out=shifted_BV)
