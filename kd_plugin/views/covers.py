"""How the tokens of both sides lie over the bytes of a response, for the comparison byte by byte.

Shape suffixes: n tokens of the student, m of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from kd_plugin.divergence.across.byte_marginals import ByteSteps, Covers
from kd_plugin.divergence.across.sorted_tokens import Flags, Ints, Ranges, SortedTokens


@dataclass(frozen=True)
class Texts:
    """Responses after one another, each with a space before it and its end of turn behind it.

    Attributes:
        raw: their bytes.
        starts: (r,) where each one's space is.
        stops: (r,) where each one's end of turn is.
    """

    raw: NDArray[np.uint8]
    starts: Ints
    stops: Ints

    @classmethod
    def of(cls, responses: Sequence[bytes]) -> Texts:
        """Put responses after one another."""
        lengths = np.array([len(one) + 1 for one in responses], np.int64)
        starts = (lengths + 2).cumsum() - lengths - 2
        raw = b"".join(b" " + one + b"\0\0" for one in responses)
        return cls(np.frombuffer(raw, np.uint8), starts, starts + lengths)


@dataclass(frozen=True)
class Spans:
    """Where tokens of one side lie in the texts.

    Attributes:
        begins: (n,) where each begins.
        ends: (n,) where each ends; that of a response's end of turn one byte behind its beginning.
        used: (n,) bool, those that are compared.
    """

    begins: Ints
    ends: Ints
    used: Flags


@dataclass(frozen=True)
class Side:
    """One side: its vocabulary, and its tokens (n,), with where they lie."""

    table: SortedTokens
    tokens: Ints
    spans: Spans


class _Cover:
    """How the tokens of a side lie over the bytes of the texts.

    Args:
        side: which.
        texts: the responses.
        crosses: whether a token is also asked about bytes behind its end; else it answers for itself alone.
    """

    def __init__(self, side: Side, texts: Texts, crosses: bool) -> None:
        self.table, self.tokens, self._raw, self._crosses = side.table, side.tokens, texts.raw, crosses
        begins, self._ends, used = side.spans.begins, side.spans.ends, side.spans.used
        row = texts.starts.searchsorted(begins, side="right") - 1
        starts, stops = texts.starts[row], texts.stops[row]
        is_first = begins == starts + 1
        spaced = self._stands(np.where(is_first, starts, begins), used & is_first)
        self._begins = np.where(spaced, starts, begins)  # its own leading space
        is_end = (self.tokens == self.table.end) & (self._begins == stops)
        self.known = self._stands(self._begins, used & ~is_end) | (used & is_end)
        self._limits, self._resolved = self._reach(stops)

    def _stands(self, begins: Ints, asked: Flags) -> Flags:
        """Return which of the tokens that are asked for are what stands from these bytes to their ends."""
        found = asked & (self.tokens < len(self.table.lengths))
        at = found.nonzero()[0]
        found[at] = self.table.lengths[self.tokens[at]] == (self._ends - begins)[at]
        at = found.nonzero()[0]
        found[at] = self.table.stands(self.tokens[at], self._raw, begins[at])
        return found

    def _reach(self, stops: Ints) -> tuple[Ints, Ints]:
        """Return how far each token is asked, and where the next one begins; -1 where that is not known."""
        follows = np.zeros(len(self.tokens), bool)
        follows[:-1] = self.known[:-1] & self.known[1:] & (self._begins[1:] == self._ends[:-1])
        last = (~follows).nonzero()[0]
        last = last[last.searchsorted(np.arange(len(follows)))] if self._crosses else np.arange(len(follows))
        return np.minimum(self._ends[last], stops), np.where(follows & self._crosses, self._ends, -1)

    @property
    def begun(self) -> tuple[Ints, Ints]:
        """The tokens that are known, and the bytes at which they begin."""
        at = self.known.nonzero()[0]
        return at, self._begins[at]

    @cached_property
    def after(self) -> Ints:
        """(E, 6) by tokens: the token, the byte, where the tokens that go on so begin and end, the depth, open."""
        at, depth, found = self.known.nonzero()[0], 0, [np.zeros((0, 6), np.int64)]
        numbers = np.zeros(len(at), np.int64)
        while len(at):
            inside = self._begins[at] + depth < self._limits[at]
            at, numbers, depth = at[inside], numbers[inside], depth + 1
            byte = self._begins[at] + depth
            prefixes = self.table.after(numbers, self._raw[byte - 1])
            is_open = prefixes.is_token & (byte != self._resolved[at])
            noted = prefixes.goes_on | is_open if self._crosses else prefixes.branches
            columns = (at, byte, prefixes.first, prefixes.stop, np.full(len(at), depth), is_open)
            found.append(np.stack(columns, -1)[noted])
            at, numbers = at[prefixes.goes_on], prefixes.numbers[prefixes.goes_on]
        after = np.concatenate(found)
        return after[after[:, 0].argsort(kind="stable")]

    @property
    def reached(self) -> Flags:
        """Which bytes of the texts a token begins at, or is asked about."""
        found = np.zeros(len(self._raw) + 1, bool)
        found[self.begun[1]] = True
        found[self.after[:, 1]] = True
        return found

    def covers(self, numbers: Ints) -> Covers:
        """Return the covers of those bytes of the texts that have a number, by those."""
        rows, begins = self.begun
        at_n, at_E = numbers[begins], numbers[self.after[:, 1]]
        here, after, at_E = at_n >= 0, self.after[at_E >= 0], at_E[at_E >= 0]
        columns = (after[:, 0], at_E, after[:, 2], after[:, 3], after[:, 4])
        ranges = Ranges(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
        tokens, known, of, at = (torch.from_numpy(one) for one in (self.tokens, self.known, rows[here], at_n[here]))
        return Covers(self.table, tokens, known, of, at, ranges, torch.from_numpy(after[:, 5] > 0))


def byte_steps(texts: Texts, student: Side, teacher: Side) -> ByteSteps:
    """Return where the choices of a student can be compared with a teacher, over the bytes of some responses.

    Args:
        texts: the responses.
        student: its scored tokens.
        teacher: its tokens that it was asked about.
    """
    mine, theirs = _Cover(student, texts, crosses=False), _Cover(teacher, texts, crosses=True)
    is_compared = mine.reached & theirs.reached
    numbers = np.where(is_compared, is_compared.cumsum() - 1, -1)
    return ByteSteps(mine.covers(numbers), theirs.covers(numbers), int(is_compared.sum()))
