"""Rollout engines: who generates the responses that teachers score, with which weights.

in_process.py is the engine over transformers, decoding.py its loop; vllm/ has vLLM generate. rows.py says who fills a
row, where its response ends, which tokens count and how rows are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Propose = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Drawn:
    """The response to one prompt, as an engine drew it.

    Attributes:
        ids: token ids up to and with the first end token.
        logprobs: nats of each token where it was drawn; None where the student of this process drew it, or nobody.
        versions: of each token the optimizer steps of the weights that drew it; None likewise.
    """

    ids: list[int]
    logprobs: list[float] | None = None
    versions: list[int] | None = None

    def cut(self, length: int) -> Drawn:
        """Return the first ``length`` tokens."""
        logprobs = None if self.logprobs is None else self.logprobs[:length]
        versions = None if self.versions is None else self.versions[:length]
        return Drawn(self.ids[:length], logprobs, versions)


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

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Drawn]:
        """Return a response to each of B prompts."""
        ...

    def proposing(self) -> AbstractContextManager[Propose]:
        """Return a block in which the student proposes tokens, and what has it do so: ``(ids, mask, count) -> ids``.

        It takes (B, P) prompts, padded on the left, and their mask, and returns (B, P + C) with up to ``count`` tokens
        behind them.
        """
        ...
