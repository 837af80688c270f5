"""Rollout engines: who generates the responses that teachers score, with which weights.

in_process.py is the engine over transformers, decoding.py its loop; interleaved.py lets a panel replace the student's
tokens; responses.py says where responses end and which tokens count, rows.py who fills a row and how rows are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

Propose = Callable[[Tensor, Tensor, int], Tensor]


class RolloutEngine(Protocol):
    """Lets the student generate with the weights of the present step.

    Shape suffixes: B rows, P prompt columns, C tokens.
    """

    @property
    def together(self) -> bool:
        """Whether ranks generate by calls that all of them must make, as sharded weights need it."""
        ...

    @property
    def takes_nothing(self) -> bool:
        """Whether :meth:`generate` may be called without a prompt; transformers cannot generate nothing."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return a response to each of B prompts: token ids up to and with the first end token."""
        ...

    def proposing(self) -> AbstractContextManager[Propose]:
        """Return a block in which the student proposes tokens, and what has it do so: ``(ids, mask, count) -> ids``.

        It takes (B, P) prompts, padded on the left, and their mask, and returns (B, P + C) with up to ``count`` tokens
        behind them.
        """
        ...
