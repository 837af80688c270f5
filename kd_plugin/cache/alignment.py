"""Notice a cache whose targets belong to the token beside.

Off by one between tokens and stored distributions is the classic bug of this field, and it trains without an
error. It shows in the data alone: the text's own next token is likelier under its target than the tokens before
and after it are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.errors import CacheError
from kd_plugin.signals import SparseSignal

# Targets shifted by one gain several nats a token at the wrong offset; chance differences stay far below this
_MARGIN = 0.5
_FEWEST = 32


@dataclass(frozen=True)
class Alignment:
    """Mean log-probability, in nats, that targets give to the text's tokens.

    Attributes:
        logprob: offset to mean: 0 is the token that the target is for, -1 the one before it, 1 the one after.
        positions: number of positions looked at.
    """

    logprob: Mapping[int, float]
    positions: int

    @property
    def shift(self) -> int:
        """The offset at which targets fit best, 0 unless another one fits clearly better."""
        best = max(self.logprob, key=self.logprob.__getitem__)
        clear = self.positions >= _FEWEST and self.logprob[best] - self.logprob[0] > _MARGIN
        return best if clear else 0


def measure_alignment(cache: TeacherCache, rows: int = 64) -> Alignment:
    """Hold the targets of up to ``rows`` rows, spread over the cache, against the tokens beside them."""
    dataset = cache.dataset()
    step = max(1, len(dataset) // rows)
    sums, count = {-1: 0.0, 0: 0.0, 1: 0.0}, 0
    for row in list(range(0, len(dataset), step))[:rows]:
        example = dataset[row]
        tokens = torch.as_tensor(example["input_ids"])
        index = torch.as_tensor(example["teacher_index"])
        inner = torch.arange(len(tokens) - 2)
        inner = inner[index[inner] >= 0]
        if not len(inner):
            continue
        signal = cache.signal(index[inner])
        for offset in sums:
            sums[offset] += float(_logprob_of(tokens[inner + 1 + offset], signal, cache.manifest.vocab_size).sum())
        count += len(inner)
    return Alignment({offset: total / max(count, 1) for offset, total in sums.items()}, count)


def require_aligned(cache: TeacherCache, rows: int = 64) -> Alignment:
    """Refuse a cache whose targets fit the neighbouring token better than their own.

    Raises:
        CacheError: names the shift that was found.
    """
    found = measure_alignment(cache, rows)
    if found.shift:
        raise CacheError(
            f"The targets in {cache.path} are shifted by {found.shift:+d} token: over {found.positions} positions they "
            f"give the text's next token {found.logprob[0]:.2f} nats on average, but its neighbour at {found.shift:+d} "
            f"{found.logprob[found.shift]:.2f} nats. The target stored at position t must be the distribution over "
            "token t+1. Capture again with this package, or mend what wrote the cache."
        )
    return found


def _logprob_of(tokens: Tensor, signal: SparseSignal, vocab_size: int) -> Tensor:
    """Return what each target gives to one token, (N,); unlisted tokens share the tail evenly."""
    listed = (signal.ids == tokens[:, None]) & (signal.logprobs > -torch.inf)
    own = torch.where(listed, signal.logprobs.float(), -torch.inf).amax(dim=1)
    unlisted = (vocab_size - (signal.logprobs > -torch.inf).sum(dim=1)).clamp(min=1)
    share = signal.tail_logmass.float() - unlisted.log()
    return torch.where(listed.any(dim=1), own, share).clamp(min=-30.0)
