"""How the gradient of each chunk of logits becomes that of the student's hidden states, head weight and head bias.

Each chunk is multiplied at once, or its tile is kept, in the dtype of the product, until several are multiplied
together: the gradient of a head of 150,000 tokens is gigabytes in float32, and is read and written by each product.

Shape suffixes: N positions, R positions of one chunk, G positions whose tiles are kept, V real tokens, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugin.divergence import projection

# The gradient tiles that an accelerator keeps between two updates of the head's gradient, in chunks. In two bytes they
# take what the passes of a chunk took before they were compiled, and products of 2,000 rows are bound by arithmetic.
_CHUNKS_KEPT = 5
_ALIGNED_ROWS = 8  # tiles begin at multiples of 16 bytes, as compiled kernels expect, whatever V is


def kept_rows(rows: int, device: torch.device, *, groups: int = 1, compiled: bool) -> int:
    """Of how many positions gradient tiles are kept, where a chunk has ``rows``; 0 for none.

    By compiled passes the gradient of an accelerator's head is read and written once for so many, in place of once a
    chunk. On a CPU the chunks of several groups, which may be short, fill one tile together.
    """
    if device.type == "cpu":
        return rows if groups > 1 else 0
    return _CHUNKS_KEPT * rows if compiled else 0


class StudentGradient:
    """Collects the gradient of a loss with respect to hidden states, head weight and head bias, chunk by chunk.

    Sums over chunks are kept in the statistics dtype: rounding each chunk's part to bfloat16 would bias training.

    Args:
        hidden_NH: the student's hidden states; the gradient has their shape.
        head: the student's head as autograd knows it; gradients have the full shape of its parameters, with zero
            rows beyond ``vocab_size``.
        projector: what projects the chunks.
        needs: whether hidden states, weight and bias need a gradient.
        statistics: dtype of the sums.
        kept: of how many positions gradient tiles are kept before they are multiplied; 0 multiplies each chunk.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projector: projection.Projector,
        needs: tuple[bool, bool, bool],
        statistics: torch.dtype,
        kept: int = 0,
    ) -> None:
        device = hidden_NH.device

        def zeros(like: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros(like.shape, dtype=statistics, device=device) if needed and like is not None else None

        self.hidden_NH = zeros(hidden_NH, needs[0])
        self.weight = zeros(weight, needs[1])
        self.bias = zeros(bias, needs[2])
        self._projector = projector
        self._vocab = projector.weight_VH.shape[0]
        self._kept_GV: Tensor | None = None
        self._most, self._filled = min(kept, hidden_NH.shape[0] + 8 * _ALIGNED_ROWS), 0
        self._waiting: list[
            tuple[int, Tensor, slice | Tensor]
        ] = []  # first row in the tiles kept, hidden states, where

    def room(self, hidden_RH: Tensor) -> Tensor | None:
        """Return memory (R, V) for the next chunk's gradient, in the dtype of its product; None where none is kept.

        Args:
            hidden_RH: the chunk's hidden states in the compute dtype.
        """
        if not self._most or self._projector.slope_RV is not None:
            return None
        return self._room(hidden_RH)

    def _room(self, hidden_RH: Tensor) -> Tensor:
        rows, wide = hidden_RH.shape[0], self._projector.statistics
        if self._filled + rows > self._most:
            self._multiply()
        if self._kept_GV is None:
            narrow = projection.can_widen(hidden_RH.dtype, wide, hidden_RH.device)
            dtype = hidden_RH.dtype if narrow else wide
            self._kept_GV = torch.empty(max(self._most, rows), self._vocab, dtype=dtype, device=hidden_RH.device)
        return self._kept_GV[self._filled : self._filled + rows]

    def add(self, grad_RV: Tensor, hidden_RH: Tensor, where: slice | Tensor) -> None:
        """Add one chunk.

        Args:
            grad_RV: gradient with respect to the scaled, soft-capped logits, already multiplied by the
                projector's ``multiplier``; overwritten.
            hidden_RH: the chunk's hidden states in the compute dtype.
            where: the chunk's positions among N.
        """
        if self._projector.slope_RV is not None:
            grad_RV.mul_(self._projector.slope_RV)
        if self.bias is not None:
            self.bias[: self._vocab] += grad_RV.sum(0, dtype=self.bias.dtype)
        if self._most:
            self._keep(grad_RV, hidden_RH, where)
            return
        if self.weight is not None:
            self._add_weight(grad_RV, hidden_RH)
        if self.hidden_NH is not None:
            self._put(self._narrow(grad_RV, hidden_RH.dtype) @ self._projector.weight_VH, where)

    def _put(self, grad_RH: Tensor, where: slice | Tensor) -> None:
        """Write the gradient of some hidden states."""
        assert self.hidden_NH is not None
        if isinstance(where, slice):
            self.hidden_NH[where] = grad_RH.to(self.hidden_NH.dtype)
        else:
            self.hidden_NH.index_copy_(0, where, grad_RH.to(self.hidden_NH.dtype))

    def _keep(self, grad_RV: Tensor, hidden_RH: Tensor, where: slice | Tensor) -> None:
        """Keep a chunk's tile, which may stand in its room already; rows up to the next aligned one are zero."""
        room_RV, rows = self._room(hidden_RH), len(hidden_RH)
        if grad_RV.data_ptr() != room_RV.data_ptr() or grad_RV.dtype != room_RV.dtype:
            room_RV.copy_(grad_RV)
        assert self._kept_GV is not None
        self._waiting.append((self._filled, hidden_RH, where))
        last = self._filled + rows
        self._filled = -(-last // _ALIGNED_ROWS) * _ALIGNED_ROWS
        self._kept_GV[last : self._filled].zero_()

    def _multiply(self) -> None:
        """Form the gradients of head and hidden states from the tiles that are kept."""
        if not self._waiting:
            return
        assert self._kept_GV is not None
        width = self._waiting[0][1].shape[1]
        grad_GV = self._kept_GV[: self._filled]
        hidden_GH = self._waiting[0][1].new_zeros(len(grad_GV), width)
        for first, hidden_RH, _ in self._waiting:
            hidden_GH[first : first + len(hidden_RH)] = hidden_RH
        if self.weight is not None:
            self._add_weight(grad_GV, hidden_GH)
        if self.hidden_NH is not None:
            found_GH = grad_GV.to(hidden_GH.dtype) @ self._projector.weight_VH
            for first, hidden_RH, where in self._waiting:
                self._put(found_GH[first : first + len(hidden_RH)], where)
        self._waiting, self._filled = [], 0

    def _add_weight(self, grad_RV: Tensor, hidden_RH: Tensor) -> None:
        assert self.weight is not None
        total_VH = self.weight[: self._vocab]
        if projection.can_widen(hidden_RH.dtype, total_VH.dtype, grad_RV.device):
            narrow_RV = self._narrow(grad_RV, hidden_RH.dtype)
            torch.addmm(total_VH, narrow_RV.t(), hidden_RH, out_dtype=torch.float32, out=total_VH)
        else:
            total_VH.addmm_(grad_RV.t(), hidden_RH.to(grad_RV.dtype))

    def _narrow(self, grad_RV: Tensor, dtype: torch.dtype) -> Tensor:
        if grad_RV.dtype == dtype:
            return grad_RV
        return self._projector.workspace.get("narrow", grad_RV.shape[0], dtype).copy_(grad_RV)

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients, in the statistics dtype; to be called once, after all chunks."""
        self._multiply()
        return self.hidden_NH, self.weight, self.bias
