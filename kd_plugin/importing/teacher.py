"""Stored outputs as a teacher that is asked only about the rows that it was stored for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.schema import example_id
from kd_plugin.errors import DataError
from kd_plugin.lineage.sources import Source
from kd_plugin.signals import SparseSignal
from kd_plugin.teachers.base import Capabilities
from kd_plugin.vocab import Vocabulary

MOST_MASS = 1.05  # of the listed tokens; what a lossy form adds is less, and a wrong reading adds more


@dataclass(frozen=True)
class StoredTargets:
    """What was stored at the N positions of a row.

    Attributes:
        ids: (N, K) token ids.
        logprobs: (N, K) nats under the teacher's full softmax; ``-inf`` where fewer tokens were listed.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]


class StoredOutputs(Protocol):
    """Rows in the form of another tool.

    Attributes:
        listed: tokens stored at a position, at most.
        temperature: by which the teacher's logits were divided.
        identity: what gives the stored bytes their meaning, and tells them from others.
        dataset: what they are read from.
    """

    listed: int
    temperature: float
    identity: Mapping[str, Any]
    dataset: Any

    def __len__(self) -> int: ...

    def tokens(self, row: int) -> Sequence[int]:
        """Return a row's token ids, without its distributions."""
        ...

    def scored(self, row: int) -> range:
        """Return the positions t of a row that have a distribution, which is that over token t + 1."""
        ...

    def row(self, row: int) -> StoredTargets:
        """Return what was stored of a row; raises DataError where it cannot be read."""
        ...


class StoredRows:
    """The rows as a capture takes them, scored where something was stored.

    Args:
        outputs: the rows, by whose ``dataset`` lineage finds their card.
    """

    def __init__(self, outputs: StoredOutputs) -> None:
        self.outputs, self.dataset = outputs, outputs.dataset

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        ids, held = list(self.outputs.tokens(row)), self.outputs.scored(row)
        return {"input_ids": ids, "completion_mask": [int(at - 1 in held) for at in range(len(ids))]}


class StoredTeacher:
    """Answers a capture's questions about the rows of stored outputs.

    Args:
        outputs: the rows.
        source: who wrote them, and under which terms.
        tokenizer: whose tokens they are.
    """

    def __init__(self, outputs: StoredOutputs, source: Source, tokenizer: Any) -> None:
        self.outputs, self.source, self.tokenizer = outputs, source, tokenizer
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)

    @property
    def capabilities(self) -> Capabilities:
        """Its likeliest tokens; a capture asks about no rows but these."""
        has = self.outputs
        return Capabilities("stored outputs", frozenset({"top_k"}), temperature=has.temperature, listed=has.listed)

    @property
    def identity(self) -> dict[str, Any]:
        """What was stored, by content."""
        digest = hashlib.sha256(json.dumps(dict(self.outputs.identity), sort_keys=True).encode()).hexdigest()
        return {"kind": "stored", "content": digest}

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> SparseSignal:
        """Look the positions up; see :meth:`~kd_plugin.teachers.base.Teacher.score`.

        Raises:
            DataError: a row, or a position of it, was not stored; or what was stored is no distribution.
        """
        length, wanted = input_ids.shape[1], positions.numpy()
        listed = self.outputs.listed
        ids = np.zeros((len(wanted), listed), np.int64)
        logprobs = np.full((len(wanted), listed), -np.inf, np.float32)
        for row in np.unique(wanted // length):
            tokens = input_ids[row][attention_mask[row] != 0].tolist()
            number = self._numbers.get(example_id(tokens))
            if number is None:
                raise DataError(f"A row of {len(tokens)} tokens is not among the stored outputs.")
            stored, held = self.outputs.row(number), self.outputs.scored(number)
            here = wanted // length == row
            padding = int((attention_mask[row] == 0).long().cumprod(0).sum())
            at = wanted[here] - row * length - padding - held.start
            if at.min() < 0 or at.max() >= len(held):
                raise DataError(
                    f"Row {number} was stored for positions {held.start} to {held.stop - 1}, and not for all."
                )
            ids[here, : stored.ids.shape[1]] = stored.ids[at]
            logprobs[here, : stored.ids.shape[1]] = stored.logprobs[at]
            _require_distributions(stored, f"Row {number}", held.start, self.vocabulary.size)
        mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
        with np.errstate(divide="ignore"):
            tail = np.log(np.clip(1.0 - mass, 0.0, None)).astype(np.float32)
        ids[~np.isfinite(logprobs)] = 0
        return SparseSignal(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(tail))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The row of each token sequence; of equal ones the first, since a teacher says the same of both."""
        numbers: dict[str, int] = {}
        for number in range(len(self.outputs)):
            numbers.setdefault(example_id(self.outputs.tokens(number)), number)
        return numbers


def _require_distributions(stored: StoredTargets, row: str, first: int, size: int) -> None:
    """Refuse numbers that no teacher gave, which a wrong reading shows in.

    Raises:
        DataError: names the row, the position and the value.
    """
    there = np.isfinite(stored.logprobs)
    mass = np.where(there, np.exp(np.minimum(stored.logprobs.astype(np.float64), 1.0)), 0.0).sum(axis=1)
    bad = np.isnan(stored.logprobs).any(axis=1) | (mass > MOST_MASS) | ~there.any(axis=1)
    foreign = (there & ((stored.ids < 0) | (stored.ids >= size))).any(axis=1)
    for where, what in ((bad, "no distribution"), (foreign, f"tokens beyond the tokenizer's {size}")):
        if where.any():
            at = int(np.flatnonzero(where)[0])
            raise DataError(
                f"{row}, position {first + at}: the stored values are {what} (mass {mass[at]:.3f}, ids "
                f"{stored.ids[at, :3].tolist()}, log-probabilities {stored.logprobs[at, :3].tolist()}). The settings "
                "of the compression, or the tokenizer, are not those of the capture."
            )
