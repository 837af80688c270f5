"""Two vocabularies that share a part: the shared tokens, and all others of a side as one outcome, its *rest*.

Logits z over one side's tokens are folded into logits over the J outcomes, where that of the rest is log Σ exp z over
the rest. So every divergence, and every way to combine teachers, compares outcomes as it compares tokens, and is exact
where no side has mass on its rest. The gradient goes back by the chain rule: a token of the rest gets its share,
softmax of z over the rest, of what the outcome gets.

A side may have no token beside the shared ones, where the other has some. The outcome is then impossible to that side,
and some divergences are infinite there. The forward KL of a student that has no such token leaves the outcome out: it
compares both sides given that the token is a shared one. The reverse KL from a teacher that has none takes the outcome
for a millionth likely to it: left out, the student's own tokens would be free to it.

Shape suffixes: R positions of a chunk, V tokens of one side, C shared tokens, J outcomes: C + 1, or C without the rest.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kd_plugin.divergence.compiled.tiles import CompiledTiles
from kd_plugin.divergence.projection import Workspace
from kd_plugin.divergence.tiles import Tiles
from kd_plugin.errors import ConfigError
from kd_plugin.signals import OutputHead
from kd_plugin.vocab import SharedTokens

# Logit, below the normalizer of the shared tokens, of a rest without mass: it adds exactly 0 to every divergence and
# its gradient, where -inf would add inf - inf
_ABSENT = -1e4


class Folding:
    """Folds the logits of one side at some positions, and unfolds their gradient.

    Args:
        shared: the two vocabularies.
        size: V, rows of this side's head.
        least: probability of the rest, relative to the shared tokens', at least; None where the rest is no outcome.
            See :meth:`Divergence.least_rest`.
        device: of the logits.
    """

    def __init__(self, shared: SharedTokens, size: int, least: float | None, device: torch.device) -> None:
        self._shared_C, self._rest = _indices(shared, size, device)
        self._least = math.log(least) if least else _ABSENT
        self._count, self._has_outcome = shared.count, least is not None
        self.outcomes = self._count + self._has_outcome
        self._share: Tensor | None = None  # softmax over the rest, of the positions that were folded last

    def fold(self, logits_RV: Tensor, out_RJ: Tensor) -> Tensor:
        """Write the logits of the outcomes to ``out_RJ`` and return it; its softmax is that of the tokens, summed."""
        common_RC = out_RJ[:, : self._count]
        if isinstance(self._shared_C, slice):
            common_RC.copy_(logits_RV[:, self._shared_C])
        else:
            common_RC.copy_(logits_RV.index_select(1, self._shared_C))
        if self._has_outcome:
            floor_R1 = common_RC.logsumexp(-1, keepdim=True) + self._least
            rest = self._of_rest(logits_RV)
            mass_R1 = floor_R1 if rest is None else rest.logsumexp(-1, keepdim=True)
            if rest is not None:
                self._share = (rest - mass_R1.clamp(min=torch.finfo(rest.dtype).min)).exp_()
            out_RJ[:, self._count :] = torch.maximum(mass_R1, floor_R1)
        return out_RJ

    def unfold(self, grad_RJ: Tensor, out_RV: Tensor) -> Tensor:
        """Write the gradient in the tokens' logits to ``out_RV``, from that in the outcomes', and return it."""
        if isinstance(self._shared_C, slice):
            out_RV[:, self._shared_C].copy_(grad_RJ[:, : self._count])
        else:
            out_RV.index_copy_(1, self._shared_C, grad_RJ[:, : self._count])
        if self._rest is None:
            return out_RV
        rest = torch.zeros((), dtype=out_RV.dtype, device=out_RV.device)
        if self._has_outcome:
            assert self._share is not None
            rest = self._share.mul_(grad_RJ[:, self._count :])
        if isinstance(self._rest, slice):
            out_RV[:, self._rest] = rest
        else:
            out_RV.index_copy_(1, self._rest, rest.expand(len(out_RV), len(self._rest)))
        return out_RV

    def columns(self, tokens_R: Tensor) -> Tensor:
        """Return for each token its outcome (R,), the last one for a token that is not shared."""
        if isinstance(self._shared_C, slice):
            return torch.where(tokens_R < self._count, tokens_R, self.outcomes - 1)
        at_R = torch.searchsorted(self._shared_C, tokens_R).clamp_(max=self._count - 1)
        return torch.where(self._shared_C[at_R] == tokens_R, at_R, self.outcomes - 1)

    def _of_rest(self, logits_RV: Tensor) -> Tensor | None:
        if self._rest is None:
            return None
        return logits_RV[:, self._rest] if isinstance(self._rest, slice) else logits_RV.index_select(1, self._rest)


class OutcomeTiles:
    """Tiles over the outcomes that a student and some teachers are compared on: all tokens, or the shared and the rest.

    Args:
        tiles: over these outcomes.
        compiled: the same for two rows or more, by compiled passes; None for step by step.
        student: folds the student's logits; None where the outcomes are the tokens.
    """

    def __init__(self, tiles: Tiles, compiled: CompiledTiles | None, student: Folding | None = None) -> None:
        self._forms, self._student = (tiles, compiled), student
        self.tiles: Tiles | CompiledTiles = tiles

    def start(self, logits_RV: Tensor, multiplier: float, teachers: int) -> Tensor:
        """See :meth:`Tiles.start`."""
        plain, compiled = self._forms
        self.tiles = plain if compiled is None or len(logits_RV) == 1 else compiled
        folded = logits_RV
        if self._student is not None:
            folded = self._student.fold(logits_RV, self.tiles.room("student", len(logits_RV)))
        return self.tiles.start(folded, multiplier, teachers)

    def take(self, logits_RV: Tensor, teacher: Folding | None) -> None:
        """Fold a teacher's logits where it has a folding, and hand them over; see :meth:`Tiles.take`."""
        if teacher is not None:
            logits_RV = teacher.fold(logits_RV, self.tiles.room("teacher", len(logits_RV)))
        self.tiles.take(logits_RV)

    def gradient(self, spare_RV: Tensor, out_RV: Tensor | None = None) -> Tensor:
        """(R, V) gradient in the student's tokens, see :meth:`Tiles.gradient`; it may be written to ``spare_RV``.

        Where ``out_RV`` is given and no tokens are folded, it is written there, in the dtype of that.
        """
        if self._student is None:
            return self.tiles.gradient(out_RV)
        return self._student.unfold(self.tiles.gradient(), spare_RV)


class Comparisons:
    """The comparisons of a pass; teachers that are compared on the same outcomes use one.

    Args:
        workspace: of the student's logits.
        dtype: of all buffers.
        need_grad: whether gradients will be asked for.
        compiled: whether passes are compiled.
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype, need_grad: bool, compiled: bool = False) -> None:
        self._workspace, self._dtype, self._need_grad, self._compiled = workspace, dtype, need_grad, compiled
        self._found: dict[object, OutcomeTiles] = {}

    def over(self, shared: SharedTokens | None, least: float | None) -> tuple[OutcomeTiles, Folding | None]:
        """Return the comparison over the tokens of both sides, and what folds this teacher's logits for it.

        Args:
            shared: what they share; None for all tokens of both.
            least: probability of the rest to this teacher at least; None where the rest is no outcome.
        """
        rows, device = self._workspace.rows, self._workspace.device
        if shared is None:
            if None not in self._found:
                self._found[None] = OutcomeTiles(*self._tiles(self._workspace))
            return self._found[None], None
        key = shared.runs, shared.student_size, least is None
        if key not in self._found:
            student = Folding(shared, shared.student_size, None if least is None else 0.0, device)
            folded = Workspace(rows, student.outcomes, device)
            self._found[key] = OutcomeTiles(*self._tiles(folded), student)
        return self._found[key], Folding(shared, shared.teacher_size, least, device)

    def _tiles(self, workspace: Workspace) -> tuple[Tiles, CompiledTiles | None]:
        settings = workspace, self._dtype, self._need_grad
        return Tiles(*settings), CompiledTiles(*settings) if self._compiled else None


def require_shared_rows(student: OutputHead, teacher: OutputHead, shared: SharedTokens) -> None:
    """Refuse gathered heads whose rows are not those of the two vocabularies."""
    mine, theirs = student.weight.shape[0], teacher.weight.shape[0]
    if (mine, theirs) != (shared.student_size, shared.teacher_size):
        raise ConfigError(
            f"The student's head has {mine} rows and a teacher's has {theirs}; the vocabularies that share a part have "
            f"{shared.student_size} and {shared.teacher_size}. Set OutputHead.vocab_size to these on both sides."
        )


@lru_cache(maxsize=64)
def _indices(shared: SharedTokens, size: int, device: torch.device) -> tuple[slice | Tensor, slice | Tensor | None]:
    """Return where the shared tokens and the rest stand, as slices where they can be."""
    if len(shared.runs) == 1 and shared.runs[0][0] == 0:
        return slice(0, shared.count), slice(shared.count, size) if size > shared.count else None
    rest = shared.rest(size)
    return torch.tensor(shared.ids(), device=device), torch.tensor(rest, device=device) if rest else None
