"""A vocabulary sorted by the bytes of its tokens: those that begin with the same bytes are one range.

Shape suffixes: V tokens, U tokens with a text, E ranges.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Outcomes behind the bytes: the end of a response, and the rest, of which it is not known how it goes on
END, REST = 256, 257
OUTCOMES = 258


@dataclass(frozen=True)
class Prefixes:
    """Some texts by which tokens may begin.

    Attributes:
        numbers: (n,) by which they are known; 0 is that of no text, by which all tokens begin.
        first: (n,) where the tokens that begin so begin in the sorted vocabulary.
        stop: (n,) where those end.
        is_token: (n,) bool, whether a token ends there.
        goes_on: (n,) bool, whether a token goes on behind it.
        branches: (n,) bool, whether a token goes on, and more than one thing can follow.
    """

    numbers: Ints
    first: Ints
    stop: Ints
    is_token: Flags
    goes_on: Flags
    branches: Flags


class SortedTokens:
    """A vocabulary sorted by the bytes of its tokens.

    Args:
        texts: of each token, by id; None or empty for one that stands for no text.
        end: the token that ends a response, or None.

    Attributes:
        lengths: (V,) bytes of each token, 0 for none.
    """

    def __init__(self, texts: Sequence[bytes | None], end: int | None) -> None:
        self.texts = [None if i == end else text for i, text in enumerate(texts)]
        self.end = end
        known = sorted((text, i) for i, text in enumerate(self.texts) if text)
        self._sorted = [text for text, _ in known]
        self._order = [i for _, i in known]
        self._tensors: dict[tuple[torch.device, int], TokenTensors] = {}
        self._known = [b""]  # prefixes, by number
        self._places: list[tuple[int, int, int, int, int]] = [(0, len(known), 0, 1, 1)]
        self._numbers: dict[int, int] = {}  # by that of the text before the last byte, and that byte
        self.lengths = np.array([len(text or b"") for text in self.texts], np.int64)
        self._begins = self.lengths.cumsum() - self.lengths
        self._bytes = np.frombuffer(b"".join(text or b"" for text in self.texts), np.uint8)

    def stands(self, tokens: Ints, text: NDArray[np.uint8], at: Ints) -> Flags:
        """Return for tokens (n,) which of them are what the text says from ``at`` (n,) on."""
        lengths = self.lengths[tokens]
        own = np.arange(len(tokens)).repeat(lengths)
        inside = np.arange(len(own)) - (lengths.cumsum() - lengths).repeat(lengths)
        differs = self._bytes[self._begins[tokens].repeat(lengths) + inside] != text[at.repeat(lengths) + inside]
        found = lengths > 0
        found[own[differs]] = False
        return found

    def after(self, numbers: Ints, bytes_: NDArray[np.uint8]) -> Prefixes:
        """Return the prefixes that are one byte longer than some (n,), by these bytes (n,)."""
        keys, at = np.unique(numbers * 256 + bytes_, return_inverse=True)
        found = [self._numbers[key] if key in self._numbers else self._number(key) for key in keys.tolist()]
        first, stop, *flags = np.array([self._places[i] for i in found], np.int64).reshape(-1, 5)[at].T
        return Prefixes(np.array(found, np.int64)[at], first, stop, *(flag > 0 for flag in flags))

    def _number(self, key: int) -> int:
        before, byte = divmod(key, 256)
        prefix = self._known[before] + bytes([byte])
        same, longer = bisect_left(self._sorted, prefix), bisect_right(self._sorted, prefix)
        head = prefix.rstrip(b"\xff")
        stop = bisect_left(self._sorted, head[:-1] + bytes([head[-1] + 1])) if head else len(self._sorted)
        goes_on, depth = stop > longer, len(prefix)
        branches = goes_on and (longer > same or self._sorted[longer][depth] != self._sorted[stop - 1][depth])
        self._numbers[key] = len(self._known)
        self._known.append(prefix)
        self._places.append((same, stop, longer > same, goes_on, branches))
        return self._numbers[key]

    def on(self, device: torch.device, size: int) -> TokenTensors:
        """Return the same as tensors, for a head of ``size`` tokens; further ones stand for no text."""
        if (device, size) not in self._tensors:
            group = torch.full((size,), REST)
            order = torch.tensor(self._order, dtype=torch.int64)
            group[order] = torch.tensor([text[0] for text in self._sorted], dtype=torch.int64)
            if self.end is not None:
                group[self.end] = END
            lengths = torch.tensor([0, *(len(text) + 1 for text in self._sorted)], dtype=torch.int64)
            flat = torch.tensor([symbol for text in self._sorted for symbol in (*text, REST)], dtype=torch.int64)
            found = (group, order, lengths.cumsum(0)[:-1], flat)
            self._tensors[device, size] = TokenTensors(*(t.to(device) for t in found))
        return self._tensors[device, size]


@dataclass(frozen=True)
class TokenTensors:
    """A sorted vocabulary of U tokens with a text.

    Attributes:
        group: (V,) by first byte; REST of one without a text.
        order: (U,) ids.
        begins: (U,) where each one's bytes begin in ``flat``.
        flat: the bytes of all, each one's with REST behind them.
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

    def select(self, part: slice) -> Ranges:
        """Return some of them."""
        return Ranges(*(t[part] for t in (self.rows, self.bytes, self.first, self.stop, self.depth)))
