"""What a teacher says of a response in tokens of its own, chunk by chunk.

Shape suffixes: n scored positions of the student, M positions of the teacher, k chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.divergence.across.byte_marginals import ByteSteps
from kd_plugin.divergence.listed import logprobs_of
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.views.align import Alignment
from kd_plugin.views.covers import ResponseSpans, Spans, byte_steps
from kd_plugin.views.projection import Places, Projection, project, shifted
from kd_plugin.views.tokens import Ints


@dataclass(frozen=True)
class ChunkSignal:
    """A teacher's signal at its own tokens, and how those belong to the student's scored positions.

    Attributes:
        signal: at the M teacher positions of the chunks that can be compared.
        tokens: (M,) int64 the teacher's token that stands next to each.
        teacher_chunks: (M,) int64 the chunk of each of them.
        places: of the n student positions: their chunks, and where in the teacher's tokens they lie.
        projection: from the teacher's vocabulary to the student's.
        responses: where the tokens of both sides lie in the text of each response.
    """

    signal: HiddenSignal | SparseSignal
    tokens: Tensor
    teacher_chunks: Tensor
    places: Places
    projection: Projection
    responses: tuple[ResponseSpans, ...]

    shared = None  # of tokens with equal ids; see the other signals

    def __len__(self) -> int:
        return len(self.places)

    @property
    def compared(self) -> Tensor:
        """(n,) bool, the student positions that lie in a chunk."""
        return self.places.chunks >= 0

    def with_head(self, head: OutputHead) -> ChunkSignal:
        """Return the same with this output head, which was gathered."""
        if not isinstance(self.signal, HiddenSignal):
            return self
        own = replace(self.signal.head, weight=head.weight, bias=head.bias)
        return replace(self, signal=replace(self.signal, head=own))

    @classmethod
    def joined(cls, signals: Sequence[ChunkSignal]) -> ChunkSignal:
        """Put the positions of one teacher's rows after one another."""
        first = signals[0].signal
        if isinstance(first, HiddenSignal):
            hidden = torch.cat([s.signal.hidden for s in signals if isinstance(s.signal, HiddenSignal)])
            signal: HiddenSignal | SparseSignal = replace(first, hidden=hidden)
        else:
            signal = SparseSignal.joined([s.signal for s in signals if isinstance(s.signal, SparseSignal)])
        tokens = torch.cat([s.tokens for s in signals])
        teacher_chunks = shifted([s.teacher_chunks for s in signals], [s.places.count for s in signals])
        places = Places.joined([s.places for s in signals], [len(s.tokens) for s in signals])
        responses = tuple(one for s in signals for one in s.responses)
        return cls(signal, tokens, teacher_chunks, places, signals[0].projection, responses)

    def token_logprobs(self, temperature: float, name: str) -> Tensor:
        """Return (M,) nats, the teacher's of its own tokens.

        Raises:
            ConfigError: the teacher does not tell them.
        """
        if isinstance(self.signal, HiddenSignal):
            return logprobs_of(self.signal, self.tokens, temperature)
        if self.signal.sampled_token_logprobs is None:
            raise ConfigError(
                f"Teacher {name!r} reads tokens of its own and does not tell their log-probabilities, so its chunks "
                "cannot be compared. Take a teacher in this process or a server."
            )
        return self.signal.sampled_token_logprobs

    def chunk_logprobs(self, temperature: float, name: str) -> Tensor:
        """Return (n,) nats whose sums over the positions of each chunk are the teacher's of the chunk."""
        logprobs = self.token_logprobs(temperature, name)
        sums = torch.zeros(self.places.count, dtype=logprobs.dtype, device=logprobs.device)
        sums.index_add_(0, self.teacher_chunks, logprobs)
        chunks = self.places.chunks
        first = torch.ones_like(chunks, dtype=torch.bool)
        first[1:] = chunks[1:] != chunks[:-1]
        return torch.where(first & (chunks >= 0), sums[chunks.clamp(min=0)] if len(sums) else 0.0, 0.0)

    def byte_steps(self, student_tokens: Tensor) -> ByteSteps:
        """Return the bytes at which the teacher and the student can be compared.

        Args:
            student_tokens: (n,) that are scored.
        """
        student, teacher = self.projection.sorted_vocabularies
        return byte_steps(self.responses, student, student_tokens.tolist(), teacher, self.tokens.tolist())

    def listed(self, student_tokens: Tensor, top_k: int, temperature: float, name: str) -> tuple[SparseSignal, Tensor]:
        """Return what the teacher says in the student's tokens, and (n,) bool, where it says something.

        Args:
            student_tokens: (n,) that are scored.
            top_k: tokens that are listed of a teacher in this process.
            temperature: of the comparison.
            name: of the teacher.
        """
        logprobs = self.token_logprobs(temperature, name)
        return project(
            self.projection, self.signal, self.tokens, logprobs, self.teacher_chunks, self.places, student_tokens,
            top_k, temperature,
        )  # fmt: skip


@dataclass(frozen=True)
class Aligned:
    """A response in the student's tokens and in a teacher's, and the chunks of it that are compared.

    Attributes:
        alignment: of the two.
        positions: (n,) scored offsets into the student's response.
        projection: from the teacher's vocabulary to the student's.
        kept: (k,) which chunks are compared.
        comparable: how many student tokens lie in chunks that can be compared.
    """

    alignment: Alignment
    positions: Ints
    projection: Projection
    kept: NDArray[np.bool_]
    comparable: int

    @classmethod
    def of(
        cls, alignment: Alignment, positions: Sequence[int], projection: Projection, min_coverage: float = 0.0
    ) -> Aligned:
        """Compare what can be compared; nothing where that is less than a share of the scored tokens."""
        at = np.asarray(positions, np.int64).reshape(-1)
        kept = alignment.kept(at)
        comparable = int(alignment.student_sizes[kept].sum())
        return cls(alignment, at, projection, kept & (comparable >= min_coverage * len(at)), comparable)

    @property
    def is_compared(self) -> bool:
        """Whether anything is."""
        return bool(self.kept.any())

    @cached_property
    def asked(self) -> Ints:
        """(M,) offsets into the teacher's response at which it is asked: all of the chunks that are compared."""
        return (self._teacher_numbers >= 0).nonzero()[0]

    def signal(self, signal: HiddenSignal | SparseSignal) -> ChunkSignal:
        """Return what a teacher said at ``asked``, chunk by chunk."""
        device = signal.hidden.device if isinstance(signal, HiddenSignal) else signal.ids.device
        alignment, at, asked = self.alignment, self.positions, self.asked
        begins, ends = np.concatenate([[0], alignment.student_bytes])[at], alignment.student_bytes[at]
        # The teacher's token in which each student position lies: the last one that begins at or before it
        teacher_begins = np.concatenate([[0], alignment.teacher_bytes[:-1]])
        inside = teacher_begins.searchsorted(begins, side="right") - 1
        chunks = self._number_of[alignment.student_chunks[at]]
        is_in, raw = chunks >= 0, alignment.raw
        prefixes = zip(teacher_begins[inside].tolist(), np.where(is_in, begins, 0).tolist(), strict=True)
        places = Places(
            _tensor(chunks, device),
            _tensor(np.where(is_in, asked.searchsorted(inside), -1), device),
            _tensor(ends >= alignment.teacher_bytes[inside], device),
            tuple(raw[first:begin] for first, begin in prefixes),
            int(self.kept.sum()),
            tuple(_runs(chunks).tolist()),
        )
        tokens = np.asarray(alignment.tokens, np.int64)[asked]
        belongs = self._teacher_numbers[asked]
        response = ResponseSpans(
            raw,
            Spans(begins, ends, is_in),
            Spans(teacher_begins[asked], alignment.teacher_bytes[asked], np.ones(len(asked), bool)),
        )
        return ChunkSignal(
            signal, _tensor(tokens, device), _tensor(belongs, device), places, self.projection, (response,)
        )

    @cached_property
    def _teacher_numbers(self) -> Ints:
        """(m,) the number of each teacher token's chunk."""
        return self._number_of[self.alignment.teacher_chunks]

    @cached_property
    def _number_of(self) -> Ints:
        """(k + 1,) of each chunk among those that are compared, else -1; the last is found as chunk -1, none."""
        return np.concatenate([np.where(self.kept, self.kept.cumsum() - 1, -1), [-1]])


def _runs(numbers: Ints) -> Ints:
    """Return how many of the same stand in a row, for each such row."""
    changes = (numbers[1:] != numbers[:-1]).nonzero()[0] + 1
    return np.diff(np.concatenate([[0], changes, [len(numbers)]])) if len(numbers) else numbers


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
