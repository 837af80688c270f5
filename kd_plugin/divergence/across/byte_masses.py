"""What a model's next-token probabilities sum to over the tokens that go on with each byte.

At the beginning of a token all tokens are grouped by their first byte. Inside a token those that begin with the bytes
so far are grouped by the byte that follows; in a sorted vocabulary they are one range. Nothing here is as wide as
vocabulary times bytes: every token is added to one group.

Shape suffixes: N rows (next-token distributions), R rows of a tile, V tokens, E ranges, L tokens of all ranges.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin.divergence.gradient import StudentGradient
from kd_plugin.divergence.projection import Projector, Workspace, chunk_rows, chunks
from kd_plugin.signals import OutputHead

END, NONE = 256, 257  # groups behind those of the bytes: the end of a response, and what stands for no text
SYMBOLS = 257
_LOWEST = -85.0  # nats below the likeliest: e to that is still a float32, so a group is 0 only if it has no token
_WIDE = 1024  # tokens of a range from which on its rows are summed together


class SortedTokens:
    """A vocabulary sorted by the bytes of its tokens.

    Args:
        texts: of each token, by id; None or empty for one that stands for no text.
        end: the token that ends a response, or None.
    """

    def __init__(self, texts: Sequence[bytes | None], end: int | None) -> None:
        self.texts = [None if i == end else text for i, text in enumerate(texts)]
        self.end = end
        known = sorted((text, i) for i, text in enumerate(self.texts) if text)
        self._sorted = [text for text, _ in known]
        self._order = [i for _, i in known]
        self._found: dict[bytes, tuple[int, int, int]] = {}
        self._tensors: dict[tuple[torch.device, int], _Sorted] = {}

    def find(self, prefix: bytes) -> tuple[int, int, int]:
        """Return where the tokens of this text begin, where those that go on behind it do, and where those end."""
        if prefix not in self._found:
            same, longer = bisect_left(self._sorted, prefix), bisect_right(self._sorted, prefix)
            head = prefix.rstrip(b"\xff")
            stop = bisect_left(self._sorted, head[:-1] + bytes([head[-1] + 1])) if head else len(self._sorted)
            self._found[prefix] = same, longer, stop
        return self._found[prefix]

    def branches(self, same: int, longer: int, stop: int, depth: int) -> bool:
        """Whether more than one thing can follow a prefix of ``depth`` bytes, whose places :meth:`find` returned."""
        if longer == stop:
            return False
        return longer > same or self._sorted[longer][depth] != self._sorted[stop - 1][depth]

    def on(self, device: torch.device, size: int) -> _Sorted:
        """Return the same as tensors, for a head of ``size`` tokens; further ones stand for no text."""
        if (device, size) not in self._tensors:
            group = torch.full((size,), NONE)
            order = torch.tensor(self._order, dtype=torch.int64)
            group[order] = torch.tensor([text[0] for text in self._sorted], dtype=torch.int64)
            if self.end is not None:
                group[self.end] = END
            lengths = torch.tensor([0, *(len(text) + 1 for text in self._sorted)], dtype=torch.int64)
            flat = torch.tensor([symbol for text in self._sorted for symbol in (*text, END)], dtype=torch.int64)
            found = (group, order, lengths.cumsum(0)[:-1], flat)
            self._tensors[device, size] = _Sorted(*(t.to(device) for t in found))
        return self._tensors[device, size]


@dataclass(frozen=True)
class _Sorted:
    """A sorted vocabulary of U tokens with a text.

    Attributes:
        group: (V,) by first byte.
        order: (U,) ids.
        begins: (U,) where each one's bytes begin in ``flat``.
        flat: the bytes of all, each one's with END behind them.
    """

    group: Tensor
    order: Tensor
    begins: Tensor
    flat: Tensor


@dataclass(frozen=True)
class Ranges:
    """Ranges of a sorted vocabulary, each at one row.

    Attributes:
        rows: (E,) int64, rising.
        bytes: (E,) int64 number of the byte behind the prefix.
        first: (E,) int64 in the sorted vocabulary.
        stop: (E,) int64 likewise.
        depth: (E,) int64 bytes of the prefix; the byte behind it names the group.
    """

    rows: Tensor
    bytes: Tensor
    first: Tensor
    stop: Tensor
    depth: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Ranges:
        """Move all to ``device``."""
        return Ranges(*(t.to(device) for t in (self.rows, self.bytes, self.first, self.stop, self.depth)))


@dataclass(frozen=True)
class Masses:
    """Sums of probabilities, each in units of its own.

    Attributes:
        first: (N, 257) of all tokens, by first byte; the last is that of the end.
        top: (N,) nats: log of the unit of ``first``.
        after: (E, 257) of each range, by the byte behind its prefix; the last is that of tokens that end there.
        after_top: (E,) nats, likewise.
        token: (N,) nats, logits of the tokens that stand there.
        entropy: (N,) nats, of the whole distribution. Detached.
    """

    first: Tensor
    top: Tensor
    after: Tensor
    after_top: Tensor
    token: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class _Plan:
    head: OutputHead
    table: SortedTokens
    tokens: Tensor
    ranges: Ranges
    temperature: float
    needs: tuple[bool, bool, bool]
    statistics: torch.dtype
    dtype: torch.dtype
    rows: int | None


def byte_masses(
    hidden: Tensor,
    head: OutputHead,
    table: SortedTokens,
    tokens: Tensor,
    ranges: Ranges,
    temperature: float,
    needs: tuple[bool, bool, bool],
    statistics: torch.dtype,
    dtype: torch.dtype,
    rows: int | None = None,
) -> Masses:
    """Return the masses of N rows; they carry a graph to the hidden states and the head where ``needs`` says so.

    Args:
        hidden: (N, H) last hidden states.
        head: what projects them, gathered.
        table: its vocabulary.
        tokens: (N,) int64 that stand there.
        ranges: E of them.
        temperature: divides the logits.
        needs: whether hidden states, weight and bias need a gradient.
        statistics: dtype of the sums.
        dtype: of the matrix product.
        rows: of a tile; None chooses.
    """
    plan = _Plan(head, table, tokens, ranges, temperature, needs, statistics, dtype, rows)
    return Masses(*_MassFunction.apply(hidden, head.weight, head.bias, plan))


class _MassFunction(torch.autograd.Function):
    """Projects tile by tile; backward projects again, but for a single tile, whose logits stay."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            walk = _Walk(hidden_NH, plan)
            count, device = hidden_NH.shape[0], hidden_NH.device
            zeros = torch.zeros(count, dtype=plan.statistics, device=device)
            first_NG = zeros.new_zeros(count, NONE + 1)
            top_N, token_N, entropy_N = zeros, torch.zeros_like(zeros), torch.zeros_like(zeros)
            after_EB = zeros.new_zeros(len(plan.ranges), SYMBOLS)
            after_top_E = zeros.new_zeros(len(plan.ranges))
            for part in walk.parts:
                logits_RV, _ = walk.project(part)
                top_N[part] = logits_RV.amax(-1)
                token_N[part] = logits_RV.gather(1, plan.tokens[part].unsqueeze(-1))[:, 0]
                for piece in walk.pieces(part):
                    piece.sums(logits_RV, after_EB, after_top_E)
                below_RV = (logits_RV - top_N[part].unsqueeze(-1)).clamp_(min=_LOWEST)
                mass_RV = below_RV.exp()
                total_R = mass_RV.sum(-1)
                entropy_N[part] = total_R.log() - below_RV.mul_(mass_RV).sum(-1) / total_R
                first_NG[part] = first_NG[part].index_add_(1, walk.sorted.group, mass_RV)
        ctx.walk, ctx.top = walk, (top_N, after_top_E)
        ctx.inputs = hidden_NH.detach(), weight, bias
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden_NH, weight, bias))
        ctx.mark_non_differentiable(top_N, after_top_E, entropy_N)
        ctx.set_materialize_grads(True)
        return first_NG[:, :SYMBOLS].contiguous(), top_N, after_EB, after_top_E, token_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_first_NS, _, grad_after_EB, _, grad_token_N, _ = grads
        walk, (top_N, after_top_E), (hidden_NH, weight, bias) = ctx.walk, ctx.top, ctx.inputs
        grad_first_NG = torch.nn.functional.pad(grad_first_NS, (0, 1))
        with torch.autocast(grad_first_NS.device.type, enabled=False):
            plan = walk.plan
            gradient = StudentGradient(hidden_NH, weight, bias, walk.projector, plan.needs, plan.statistics)
            for part in walk.parts:
                logits_RV, hidden_RH = walk.project(part)
                grad_RV = logits_RV.sub(top_N[part].unsqueeze(-1)).clamp_(min=_LOWEST).exp_()
                grad_RV.mul_(grad_first_NG[part].index_select(1, walk.sorted.group))
                grad_RV.scatter_add_(1, plan.tokens[part].unsqueeze(-1), grad_token_N[part].unsqueeze(-1))
                for piece in walk.pieces(part):
                    piece.add_gradient(logits_RV, grad_after_EB, after_top_E, grad_RV)
                gradient.add(grad_RV.mul_(walk.projector.multiplier), hidden_RH, part)
        found = gradient.take()
        given = [None if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)]
        return (*given, None)


class _Walk:
    """The tiles of a pass, and the ranges of each."""

    def __init__(self, hidden_NH: Tensor, plan: _Plan) -> None:
        self.plan, self._hidden_NH = plan, hidden_NH.detach()
        head, count, device = plan.head.real_rows(), hidden_NH.shape[0], hidden_NH.device
        rows = min(plan.rows or chunk_rows(head.weight.shape[0], device), max(count, 1))
        self.parts = list(chunks(count, rows))
        workspace = Workspace(rows, head.weight.shape[0], device)
        self.keeps = len(self.parts) == 1 and any(plan.needs)
        self.projector = Projector(
            head, "logits", workspace, plan.dtype, plan.statistics, plan.temperature, keep_slope=any(plan.needs)
        )
        self.size = head.weight.shape[0]
        self.sorted = plan.table.on(device, self.size)
        self._kept: tuple[Tensor, Tensor] | None = None
        self._pieces: dict[int, list[_Piece]] = {}

    def project(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return (R, V) logits of a tile, and the hidden states that they are of."""
        if self._kept is not None:
            return self._kept
        hidden_RH = self._hidden_NH[part].to(self.plan.dtype)
        found = self.projector(hidden_RH), hidden_RH
        if self.keeps:
            self._kept = found
        return found

    def pieces(self, part: slice) -> list[_Piece]:
        """Return the ranges of a tile, the wide ones of one prefix together."""
        if part.start not in self._pieces:
            self._pieces[part.start] = list(self._cut(part))
        return self._pieces[part.start]

    def _cut(self, part: slice) -> Iterator[_Piece]:
        ranges = self.plan.ranges
        low, high = torch.searchsorted(ranges.rows, torch.tensor([part.start, part.stop], device=ranges.rows.device))
        here = torch.arange(int(low), int(high), device=ranges.rows.device)
        width = (ranges.stop - ranges.first)[here]
        narrow = here[width <= _WIDE]
        if len(narrow):
            yield self._narrow(narrow, part.start)
        wide = here[width > _WIDE]
        if len(wide):
            for first, stop, depth in torch.unique(
                torch.stack([ranges.first[wide], ranges.stop[wide], ranges.depth[wide]]), dim=1
            ).T.tolist():
                of = wide[(ranges.first[wide] == first) & (ranges.stop[wide] == stop)]
                columns = self.sorted.order[first:stop]
                bytes_ = self.sorted.flat[self.sorted.begins[first:stop] + depth]
                yield _WideRange(of, ranges.rows[of] - part.start, columns, bytes_)

    def _narrow(self, of: Tensor, start: int) -> _NarrowRanges:
        ranges = self.plan.ranges
        width_E = (ranges.stop - ranges.first)[of]
        own_L = torch.repeat_interleave(torch.arange(len(of), device=of.device), width_E)
        before_E = width_E.cumsum(0) - width_E
        sorted_L = torch.arange(len(own_L), device=of.device) + (ranges.first[of] - before_E)[own_L]
        byte_L = self.sorted.flat[self.sorted.begins[sorted_L] + ranges.depth[of][own_L]]
        cell_L = (ranges.rows[of] - start)[own_L] * self.size + self.sorted.order[sorted_L]
        return _NarrowRanges(of, own_L, cell_L, byte_L)


@dataclass(frozen=True)
class _NarrowRanges:
    """Many short ranges of a tile: token by token, where its logit lies and to which range and byte it belongs."""

    of_E: Tensor
    own_L: Tensor
    cell_L: Tensor
    byte_L: Tensor

    def sums(self, logits_RV: Tensor, after_EB: Tensor, top_E: Tensor) -> None:
        found_L = logits_RV.flatten()[self.cell_L]
        top = found_L.new_full((len(self.of_E),), -torch.inf).scatter_reduce_(0, self.own_L, found_L, "amax")
        mass_L = (found_L - top[self.own_L]).clamp_(min=_LOWEST).exp_()
        sums = after_EB.new_zeros(len(self.of_E) * SYMBOLS).index_add_(0, self.own_L * SYMBOLS + self.byte_L, mass_L)
        top_E[self.of_E] = top
        after_EB[self.of_E] = sums.view(-1, SYMBOLS)

    def add_gradient(self, logits_RV: Tensor, grad_EB: Tensor, top_E: Tensor, out_RV: Tensor) -> None:
        mass_L = (logits_RV.flatten()[self.cell_L] - top_E[self.of_E][self.own_L]).clamp_(min=_LOWEST).exp_()
        slope_L = grad_EB[self.of_E].flatten()[self.own_L * SYMBOLS + self.byte_L]
        out_RV.view(-1).index_add_(0, self.cell_L, mass_L.mul_(slope_L))


@dataclass(frozen=True)
class _WideRange:
    """One long range at several rows of a tile."""

    of_E: Tensor
    rows_E: Tensor
    columns: Tensor
    bytes_: Tensor

    def _at(self, logits_RV: Tensor) -> Tensor:
        return logits_RV.index_select(0, self.rows_E).index_select(1, self.columns)

    def sums(self, logits_RV: Tensor, after_EB: Tensor, top_E: Tensor) -> None:
        found = self._at(logits_RV)
        top_E[self.of_E] = found.amax(-1)
        mass = found.sub_(top_E[self.of_E].unsqueeze(-1)).clamp_(min=_LOWEST).exp_()
        after_EB[self.of_E] = after_EB[self.of_E].index_add_(1, self.bytes_, mass)

    def add_gradient(self, logits_RV: Tensor, grad_EB: Tensor, top_E: Tensor, out_RV: Tensor) -> None:
        mass = self._at(logits_RV).sub_(top_E[self.of_E].unsqueeze(-1)).clamp_(min=_LOWEST).exp_()
        mass.mul_(grad_EB[self.of_E].index_select(1, self.bytes_))
        rows = out_RV.index_select(0, self.rows_E).index_add_(1, self.columns, mass)
        out_RV.index_copy_(0, self.rows_E, rows)


_Piece = _NarrowRanges | _WideRange
