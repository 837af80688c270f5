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
_STANDARD_ERRORS = 4.0
_FEWEST = 64


@dataclass(frozen=True)
class Alignment:
    """Mean log-probability, in nats, that targets give to the text's tokens.

    Attributes:
        logprob: offset to mean: 0 is the token that the target is for, -1 the one before it, 1 the one after.
        error: offset to the standard error of its mean advantage over offset 0, in nats.
        positions: number of positions looked at.
    """

    logprob: Mapping[int, float]
    error: Mapping[int, float]
    positions: int

    def __str__(self) -> str:
        if not self.positions:
            return "alignment not checked: no position has a token on both sides."
        before, own, after = (self.logprob[offset] for offset in (-1, 0, 1))
        return (
            f"aligned; over {self.positions} positions the targets give the text's next token {own:.2f} nats, the one "
            f"before it {before:.2f}, the one after it {after:.2f}."
        )

    @property
    def shift(self) -> int:
        """The offset at which targets fit best, 0 unless another one fits clearly better."""
        best = max(self.logprob, key=self.logprob.__getitem__)
        advantage = self.logprob[best] - self.logprob[0]
        clear = advantage > max(_MARGIN, _STANDARD_ERRORS * self.error[best])
        return best if clear and self.positions >= _FEWEST else 0


def measure_alignment(cache: TeacherCache, rows: int = 64) -> Alignment:
    """Hold the targets of up to ``rows`` rows, spread over the cache, against the tokens beside them."""
    dataset = cache.dataset()
    step = max(1, len(dataset) // rows)
    given: dict[int, list[Tensor]] = {-1: [], 0: [], 1: []}
    for row in list(range(0, len(dataset), step))[:rows]:
        example = dataset[row]
        tokens = torch.as_tensor(example["input_ids"])
        index = torch.as_tensor(example["teacher_index"])
        inner = torch.arange(len(tokens) - 2)
        inner = inner[index[inner] >= 0]
        if not len(inner):
            continue
        signal = cache.signal(index[inner])
        for offset, values in given.items():
            values.append(_logprob_of(tokens[inner + 1 + offset], signal, cache.manifest.vocab_size))
    if not given[0]:
        return Alignment(dict.fromkeys(given, 0.0), dict.fromkeys(given, 0.0), 0)
    logprob = {offset: torch.cat(values) for offset, values in given.items()}
    count = len(logprob[0])
    error = {o: float((x - logprob[0]).std(correction=0)) / count**0.5 for o, x in logprob.items()}
    return Alignment({offset: float(x.mean()) for offset, x in logprob.items()}, error, count)


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
