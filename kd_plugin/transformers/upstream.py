"""The host's random order of the rows, without a Python list of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SeedableRandomSampler, get_sampler

_AT_ONCE = 1 << 12  # row numbers that are Python integers at a time


class LeanRandomSampler(SeedableRandomSampler):
    """``SeedableRandomSampler``'s order, epoch for epoch, in 4 bytes a row.

    The parent (accelerate 1.15 on torch 2.13) makes a list of the whole permutation: 40 bytes a row, so that the
    memory of training grows by 40 MB a million examples in every process.
    """

    def __iter__(self) -> Iterator[int]:
        generator: torch.Generator = self.generator or torch.Generator(device=torch.get_default_device())
        generator.manual_seed(self.epoch + self.initial_seed)
        rows = len(self.data_source)  # type: ignore[arg-type]
        # The order does not depend on the type
        small = rows <= torch.iinfo(torch.int32).max
        order = torch.randperm(rows, generator=generator, dtype=torch.int32 if small else torch.int64)
        for part in order.split(_AT_ONCE):
            yield from part.tolist()
        self.set_epoch(self.epoch + 1)


def shuffle_leanly(loader: Any) -> Any:
    """Put :class:`LeanRandomSampler` in the place of the sampler that accelerate gave ``loader``; return ``loader``.

    Other samplers (by length, in order, the user's own) are left as they are, and the order is the same.
    """
    sampler: Any = get_sampler(loader) if isinstance(loader, DataLoaderShard | DataLoaderDispatcher) else None
    # An exact type: a subclass has an order of its own. Trainer always asks for each row once.
    if type(sampler) is SeedableRandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
        lean = LeanRandomSampler(sampler.data_source, generator=sampler.generator, data_seed=sampler.initial_seed)
        lean.set_epoch(sampler.epoch)
        loader.set_sampler(lean)
    return loader
