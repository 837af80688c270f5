"""What a model's next-token probabilities sum to over the tokens that go on with each byte.

At the beginning of a token all tokens are grouped by their first byte. Inside a token those that begin with the bytes
so far are grouped by the byte that follows; in a sorted vocabulary they are one range. Nothing here is as wide as
vocabulary times bytes: every token is added to one group.

Shape suffixes: N rows (next-token distributions), R rows of a tile, V tokens, J outcomes, E ranges, L tokens of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.divergence.across.sorted_tokens import OUTCOMES, REST, Ranges, SortedTokens
from kd_plugin.divergence.projection import Projector, Workspace, chunk_rows, chunks
from kd_plugin.signals import OutputHead

_LOWEST = -85.0  # nats below the likeliest: e to that is still a float32, so a group is 0 only if it has no token
_WIDE = 1024  # tokens of a range from which on its rows are summed together


@dataclass(frozen=True)
class Masses:
    """Sums of probabilities, each in units of its own.

    Attributes:
        first: (N, 258) of all tokens with a text, by first byte, and that of the end; it has no rest.
        top: (N,) nats: log of the unit of ``first``.
        after: (E, 258) of each range, by the byte behind its prefix; its rest are the tokens that end there.
        after_top: (E,) nats, likewise.
        token: (N,) nats, logits of the tokens that stand there.
    """

    first: Tensor
    top: Tensor
    after: Tensor
    after_top: Tensor
    token: Tensor


@dataclass(frozen=True)
class ModelRows:
    """A model at some rows.

    Attributes:
        hidden: (N, H) last hidden states.
        head: what projects them, gathered or to be gathered.
        table: its vocabulary.
        tokens: (N,) int64 that stand there.
        ranges: E of them, to be summed.
        temperature: divides the logits.
        statistics: dtype of the sums.
        dtype: of the matrix product.
        rows: of a tile; None chooses.
    """

    hidden: Tensor
    head: OutputHead
    table: SortedTokens
    tokens: Tensor
    ranges: Ranges
    temperature: float
    statistics: torch.dtype
    dtype: torch.dtype
    rows: int | None = None


@torch.no_grad()
def byte_masses(model: ModelRows) -> Masses:
    """Return the masses of all rows, without a graph."""
    with torch.autocast(model.hidden.device.type, enabled=False):
        found = [tile.masses for tile in MassTiles(model)]
    if not found:
        nothing = model.hidden.new_zeros(0, dtype=model.statistics)
        sums = nothing.view(0, OUTCOMES)
        return Masses(sums, nothing, sums, nothing, nothing)
    columns = zip(*((m.first, m.top, m.after, m.after_top, m.token) for m in found), strict=True)
    return Masses(*(torch.cat(column) for column in columns))


class MassTiles:
    """Iterates over a model's rows tile by tile, each in memory that the next one overwrites.

    Args:
        model: what is projected.
        keep_slope: whether a gradient will be asked for.

    Attributes:
        projector: what projects the tiles.
    """

    def __init__(self, model: ModelRows, keep_slope: bool = False) -> None:
        self.model, head = model, model.head.real_rows()
        count, device, self.size = len(model.hidden), model.hidden.device, head.weight.shape[0]
        rows = min(model.rows or chunk_rows(self.size, device), max(count, 1))
        self.workspace = Workspace(rows, self.size, device)
        self.projector = Projector(
            head, "logits", self.workspace, model.dtype, model.statistics, model.temperature, keep_slope
        )
        self.sorted = model.table.on(device, self.size)
        self._parts = list(chunks(count, rows))

    def __iter__(self) -> Iterator[Tile]:
        for part in self._parts:
            yield Tile(self, part)


class Tile:
    """Some rows of a model.

    Args:
        tiles: which it is one of.
        part: its rows.

    Attributes:
        part: its rows.
        ranges: those of the model's that are at its rows.
        hidden: (R, H) of its rows, in the dtype of the product.
        masses: of its rows and ranges.
    """

    def __init__(self, tiles: MassTiles, part: slice) -> None:
        model, self._tiles, self.part = tiles.model, tiles, part
        self.ranges = within(model.ranges.rows, part)
        self.hidden = model.hidden[part].detach().to(model.dtype)
        self._logits_RV = logits_RV = tiles.projector(self.hidden)
        self._pieces = list(self._cut())
        top_R, count = logits_RV.amax(-1), self.ranges.stop - self.ranges.start
        self.masses = Masses(
            logits_RV.new_zeros(len(logits_RV), OUTCOMES), top_R, logits_RV.new_zeros(count, OUTCOMES),
            logits_RV.new_zeros(count), logits_RV.gather(1, model.tokens[part].unsqueeze(-1))[:, 0],
        )  # fmt: skip
        for piece in self._pieces:
            piece.sums(logits_RV, self._spare, self.masses)
        self._mass_RV = torch.sub(logits_RV, top_R.unsqueeze(-1), out=self._room("mass"))
        self._mass_RV.clamp_(min=_LOWEST).exp_()
        self.masses.first.index_add_(1, tiles.sorted.group, self._mass_RV)
        self.masses.first[:, REST] = 0.0  # of tokens without a text

    def entropy(self) -> Tensor:
        """(R,) nats, of the whole distribution."""
        total_R = self._mass_RV.sum(-1)
        below_RV = torch.sub(self._logits_RV, self.masses.top.unsqueeze(-1), out=self._spare)
        return total_R.log() - below_RV.mul_(self._mass_RV).sum(-1) / total_R

    def gradient(self, first_RJ: Tensor, after_EJ: Tensor) -> Tensor:
        """(R, V) gradient in the logits, from that in the masses; the next use of the tile overwrites it."""
        first_RJ = first_RJ.index_fill(1, first_RJ.new_full((1,), REST, dtype=torch.int64), 0.0)
        out_RV = torch.index_select(first_RJ, 1, self._tiles.sorted.group, out=self._spare).mul_(self._mass_RV)
        room_RV = self._mass_RV  # no longer needed
        for piece in self._pieces:
            piece.add_gradient(self._logits_RV, room_RV, self.masses, after_EJ, out_RV)
        return out_RV

    def _room(self, name: str) -> Tensor:
        return self._tiles.workspace.get(name, len(self._logits_RV), self._logits_RV.dtype)

    @property
    def _spare(self) -> Tensor:
        return self._room("spare")

    def _cut(self) -> Iterator[_Piece]:
        """Yield the ranges, the wide ones of one prefix together."""
        ranges, tokens = self._tiles.model.ranges.select(self.ranges), self._tiles.sorted
        rows, width = ranges.rows - self.part.start, ranges.stop - ranges.first
        narrow, wide = (width <= _WIDE).nonzero()[:, 0], (width > _WIDE).nonzero()[:, 0]
        if len(narrow):
            yield self._narrow(ranges, rows, narrow, width[narrow])
        if len(wide):
            for first, stop, depth in torch.unique(
                torch.stack([ranges.first[wide], ranges.stop[wide], ranges.depth[wide]]), dim=1
            ).T.tolist():
                alike = (ranges.first == first) & (ranges.stop == stop) & (ranges.depth == depth)
                of = alike.nonzero()[:, 0]
                bytes_ = tokens.flat[tokens.begins[first:stop] + depth]
                yield _WideRange(of, rows[of], tokens.order[first:stop], bytes_)

    def _narrow(self, ranges: Ranges, rows: Tensor, of: Tensor, width_E: Tensor) -> _NarrowRanges:
        tokens = self._tiles.sorted
        own_L = torch.repeat_interleave(torch.arange(len(of), device=of.device), width_E)
        before_E = width_E.cumsum(0) - width_E
        sorted_L = torch.arange(len(own_L), device=of.device) + (ranges.first[of] - before_E)[own_L]
        byte_L = tokens.flat[tokens.begins[sorted_L] + ranges.depth[of][own_L]]
        cell_L = rows[of][own_L] * self._tiles.size + tokens.order[sorted_L]
        return _NarrowRanges(of, own_L, cell_L, byte_L)


def within(rows: Tensor, part: slice) -> slice:
    """Return where rows (n,), which rise, are those of a part."""
    low, high = torch.searchsorted(rows, torch.tensor([part.start, part.stop], device=rows.device)).tolist()
    return slice(low, high)


@dataclass(frozen=True)
class _NarrowRanges:
    """Many short ranges of a tile: token by token, where its logit lies and to which range and byte it belongs."""

    of_E: Tensor
    own_L: Tensor
    cell_L: Tensor
    byte_L: Tensor

    def sums(self, logits_RV: Tensor, _: Tensor, masses: Masses) -> None:
        found_L = logits_RV.flatten()[self.cell_L]
        top_E = found_L.new_full((len(self.of_E),), -torch.inf).scatter_reduce_(0, self.own_L, found_L, "amax")
        mass_L = found_L.sub_(top_E[self.own_L]).clamp_(min=_LOWEST).exp_()
        sums = mass_L.new_zeros(len(self.of_E) * OUTCOMES).index_add_(0, self.own_L * OUTCOMES + self.byte_L, mass_L)
        masses.after_top[self.of_E] = top_E
        masses.after[self.of_E] = sums.view(-1, OUTCOMES)

    def add_gradient(self, logits_RV: Tensor, _: Tensor, masses: Masses, grad_EJ: Tensor, out_RV: Tensor) -> None:
        top_L = masses.after_top[self.of_E][self.own_L]
        mass_L = logits_RV.flatten()[self.cell_L].sub_(top_L).clamp_(min=_LOWEST).exp_()
        slope_L = grad_EJ[self.of_E].flatten()[self.own_L * OUTCOMES + self.byte_L]
        out_RV.view(-1).index_add_(0, self.cell_L, mass_L.mul_(slope_L))


@dataclass(frozen=True)
class _WideRange:
    """One long range at several rows of a tile."""

    of_E: Tensor
    rows_E: Tensor
    columns: Tensor
    bytes_: Tensor

    def _at(self, logits_RV: Tensor, room_RV: Tensor) -> Tensor:
        rows_EV = torch.index_select(logits_RV, 0, self.rows_E, out=room_RV[: len(self.rows_E)])
        return rows_EV.index_select(1, self.columns)

    def sums(self, logits_RV: Tensor, room_RV: Tensor, masses: Masses) -> None:
        found = self._at(logits_RV, room_RV)
        top_E = found.amax(-1)
        mass = found.sub_(top_E.unsqueeze(-1)).clamp_(min=_LOWEST).exp_()
        masses.after_top[self.of_E] = top_E
        masses.after[self.of_E] = masses.after[self.of_E].index_add_(1, self.bytes_, mass)

    def add_gradient(self, logits_RV: Tensor, room_RV: Tensor, masses: Masses, grad_EJ: Tensor, out_RV: Tensor) -> None:
        top_E1 = masses.after_top[self.of_E].unsqueeze(-1)
        mass = self._at(logits_RV, room_RV).sub_(top_E1).clamp_(min=_LOWEST).exp_()
        mass.mul_(grad_EJ[self.of_E].index_select(1, self.bytes_))
        rows = out_RV.index_select(0, self.rows_E).index_add_(1, self.columns, mass)
        out_RV.index_copy_(0, self.rows_E, rows)


_Piece = _NarrowRanges | _WideRange
