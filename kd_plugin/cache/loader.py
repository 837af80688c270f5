"""A data loader that resumes in mid-epoch and knows what is ahead of it in an accumulation window.

It is for trainers that save a loader's ``state_dict``, as Lightning does, and needs none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler


class ResumableLoader:
    """Batches of one rank, in an order that the seed and the epoch decide alone.

    A trainer saves ``state_dict()`` in each checkpoint and gives it back, so that a resumed epoch goes on with the
    batch after the last one. Rows are assigned to ranks one by one: n ranks with b rows each see together the rows that
    one rank with n * b rows sees. Where the rows do not divide by the ranks the first ones come again.

    Args:
        dataset: rows by number.
        collate: turns rows into a batch.
        batch_size: rows of a batch on this rank.
        shuffle: new order each epoch; False keeps the dataset's.
        seed: of the order.
        rank: number of this process.
        world: number of processes.
        window_end: told the number of a batch in its epoch, returns that of the first one that belongs to a later
            optimizer step; asked when the batch is next, since a trainer may change its mind between epochs.
        served: told the number of an epoch's batches, returns how many of them are handed out.
        look_ahead: is shown the batches of each window before the first one is handed out, and may change them.
        **options: of the inner ``DataLoader``, such as ``num_workers`` and ``pin_memory``.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        window_end: Callable[[int], int] = lambda batch: batch + 1,
        served: Callable[[int], int] = lambda batches: batches,
        look_ahead: Callable[[list[Any]], None] = lambda window: None,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank, self.world = rank, world
        self._window_end = window_end
        self._served = served
        self._look_ahead = look_ahead
        self._options = options
        # Lightning looks here for whom to tell the epoch and whether rows are shuffled, DeepSpeed for the batch size
        self.sampler: Any = self if shuffle else _InOrder(self)
        self.batch_sampler = self
        self._epoch = 0
        self._handed_out = 0
        self._resumed: dict[str, int] | None = None

    def __len__(self) -> int:
        return self._served(-(-self._rows_of_a_rank // self.batch_size))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch that is about to begin."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were handed out; the same on each rank."""
        return {"epoch": self._epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind what ``state`` says was handed out."""
        self._resumed = dict(state)

    def __iter__(self) -> Iterator[Any]:
        # A generator: it begins at the first batch, when Lightning has told the epoch
        start, self._resumed = self._start(), None
        batches = self._batches()[start : len(self)]
        self._handed_out = start
        loader = DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate_fn, **self._options)
        rest = iter(loader)
        # A resumed epoch may begin inside a window, whose first gradients are lost as Lightning loses them
        while window := list(itertools.islice(rest, self._window_end(self._handed_out) - self._handed_out)):
            self._look_ahead(window)
            for batch in window:
                self._handed_out += 1
                yield batch

    def _start(self) -> int:
        if self._resumed is None or self._resumed["epoch"] != self._epoch:
            return 0
        return self._resumed["batches"] if self._resumed["batches"] < len(self) else 0

    @property
    def _rows_of_a_rank(self) -> int:
        return -(-len(self.dataset) // self.world)

    def _batches(self) -> list[list[int]]:
        count = len(self.dataset)
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + self._epoch))
        wanted = self._rows_of_a_rank * self.world
        order = order.repeat(-(-wanted // max(count, 1)))[:wanted]
        mine = order[self.rank :: self.world].tolist()
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]


class _InOrder(SequentialSampler):
    """Stands for the sampler of a loader that does not shuffle: ``overfit_batches`` takes no other."""

    def __init__(self, loader: ResumableLoader) -> None:
        super().__init__(loader.dataset)
        self.set_epoch = loader.set_epoch
