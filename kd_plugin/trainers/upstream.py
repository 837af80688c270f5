"""What this host relies on inside transformers and accelerate: private names, and a sampler in the place of theirs.

No other file of this room does either; ``tests/contract/test_private_names.py`` holds that, and a test each behaviour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SeedableRandomSampler, get_sampler
from transformers import Trainer

_AT_ONCE = 1 << 12  # row numbers that are Python integers at a time


class KeptColumnsMixin(Trainer):
    """Keeps columns of the rows for the collator that the student's forward pass does not name."""

    @property
    def kept_columns(self) -> Sequence[str]:
        """Names of the columns."""
        raise NotImplementedError

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any
        self._signature_columns += [name for name in self.kept_columns if name not in self._signature_columns]


def save_checkpoint_now(trainer: Trainer) -> None:
    """Save the checkpoint of the last finished step, outside of the training loop, as the loop saves one."""
    trainer._save_checkpoint(trainer.model_wrapped, None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


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
