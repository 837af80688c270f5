"""Batches with the cached targets: any collator with them, and a loader that resumes in mid-epoch.

The loader also knows what is ahead of it in an accumulation window. It is for trainers that save a loader's
``state_dict``, as Lightning does, and needs none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from kd_plugin.cache.joining import TARGET, Untaught, targets_for, taught_batch
from kd_plugin.cache.joint import JointCache
from kd_plugin.errors import DataError
from kd_plugin.vocab import Vocabulary


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
        look_ahead: is given an epoch's windows, a list of batches each, as they are fetched, and returns them in the
            order in which they are handed out; it may fetch some before their turn, and change their batches.
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
        look_ahead: Callable[[Iterator[list[Any]]], Iterator[list[Any]]] = lambda windows: windows,
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
        for window in self._look_ahead(self._windows(iter(loader), start)):
            for batch in window:
                self._handed_out += 1
                yield batch

    def _windows(self, rest: Iterator[Any], fetched: int) -> Iterator[list[Any]]:
        # A resumed epoch may begin inside a window, whose first gradients are lost as Lightning loses them
        while window := list(itertools.islice(rest, self._window_end(fetched) - fetched)):
            fetched += len(window)
            yield window

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


@dataclass
class TeacherTargetCollator:
    """Wraps a collator, which need not know of targets.

    It runs in the data loader's workers, so that targets are read from disk ahead of the step.

    Attributes:
        inner: a collator that pads on the right, or puts all examples into one row, one after the other.
        cache: where the columns ``teacher_index`` point to.
        untaught: what becomes of tokens with a label and no target.
    """

    inner: Any
    cache: JointCache
    untaught: Untaught

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``, and add under ``teacher_target`` what :func:`taught_batch` gathers, and ``ends``.

        ``ends`` says where each example ends among the flattened (B * L) positions of the batch.

        Raises:
            DataError: the collator padded on the left, cut or reordered rows, or gave no labels.
        """
        columns = self.cache.columns
        batch = self.inner([{k: v for k, v in example.items() if k not in columns} for example in examples])
        if "labels" not in batch or "input_ids" not in batch:
            raise self._unfit(f"gives {sorted(batch)}; input_ids and labels are needed")
        rows = [torch.as_tensor(example["input_ids"]) for example in examples]
        padding_free = batch["labels"].shape[0] != len(rows)
        self._require_unmoved(batch["input_ids"], [torch.cat(rows)] if padding_free else rows)
        indices = {column: [example[column] for example in examples] for column in columns}
        batch["labels"], batch[TARGET] = taught_batch(self.cache, batch["labels"], indices, self.untaught)
        width = batch["labels"].shape[1]
        batch[TARGET]["ends"] = list(accumulate(len(row) if padding_free else width for row in rows))
        return batch

    def _require_unmoved(self, ids: Tensor, rows: list[Tensor]) -> None:
        """Refuse a batch whose tokens are not where the targets expect them: at the left edge, whole, in order."""
        for number, row in enumerate(rows):
            if len(ids) != len(rows) or not torch.equal(ids[number, : len(row)].cpu(), row.to("cpu", ids.dtype)):
                raise self._unfit(
                    f"moved the tokens of row {number} of a batch: cached targets would belong to other ones"
                )

    def _unfit(self, what: str) -> DataError:
        return DataError(
            f"The data collator {type(self.inner).__name__} {what}. Leave data_collator out, or give one that keeps "
            "the order of the rows and their tokens, and pads on the right."
        )


@dataclass(frozen=True)
class CachedRowCollator:
    """Makes batches of a cache's own rows, which have a target for each token of theirs that is trained on.

    Attributes:
        cache: whose ``dataset()`` the rows are of.
        max_length: tokens kept from the start of a row; None keeps all.
    """

    cache: JointCache
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad on the right, and gather the targets of the N scored positions under ``teacher_target``."""
        cut = slice(None, self.max_length)
        ids = [torch.as_tensor(row["input_ids"][cut]) for row in rows]
        input_ids, attention_mask = _padded(ids), _padded([torch.ones_like(one) for one in ids])
        trained = _padded([torch.as_tensor(row["completion_mask"][cut]) for row in rows])
        labels = torch.where(trained == 1, input_ids, -100)
        indices = {column: [row[column][cut] for row in rows] for column in self.cache.columns}
        labels, target = taught_batch(self.cache, labels, indices, "refuse")
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, TARGET: target}


def target_of(batch: Mapping[str, Any], cache: JointCache, untaught: Untaught, vocabulary: Vocabulary) -> Any:
    """Return the targets of a batch: those that its collator gathered, or what the columns ``teacher_index`` point to.

    Args:
        batch: with ``teacher_target``; or with the columns of ``cache``, each (B, L), and perhaps ``labels`` (B, L).
            Without labels the positions with a target are scored.
        cache: the cache, cut to ``vocabulary``.
        untaught: what becomes of tokens with a label and no target.
        vocabulary: of the run; a loader does not know the student.

    Raises:
        DataError: a token has a label and no target, and ``untaught`` is ``refuse``.
    """
    if TARGET in batch:
        return targets_for(batch[TARGET], vocabulary, cache.shared)
    # A collator that gathers targets in the loader's workers, as those above do, saves this copy
    indices = {column: batch[column].cpu() for column in cache.columns}
    labels = batch.get("labels")
    return cache.targets(None, indices) if labels is None else taught_batch(cache, labels.cpu(), indices, untaught)[1]


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
