"""Means over tokens, of whatever batches and ranks they were on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor


class TokenMeans:
    """Sums and counts of an evaluation; they stay on the device until :meth:`read`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[Tensor, Tensor | int]]] = defaultdict(list)

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add a batch's sum over ``count`` tokens of this rank."""
        self._sums[name].append((total.detach(), count))

    def read(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float | None]:
        """Return the mean of each quantity over the tokens of all ranks, None over no token; a collective call.

        Args:
            gather: returns the lists of all ranks as one.
        """
        own = {
            name: (sum(float(total) for total, _ in parts), sum(int(count) for _, count in parts))
            for name, parts in self._sums.items()
        }
        ranks = gather([own])
        found: dict[str, float | None] = {}
        for name in dict.fromkeys(name for sums in ranks for name in sums):
            total, count = (sum(sums.get(name, (0.0, 0))[i] for sums in ranks) for i in range(2))
            found[name] = total / count if count else None
        return found
