"""What a teacher says of a response in tokens of its own, chunk by chunk.

Shape suffixes: n scored positions of the student, M positions of the teacher, k chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from kd_plugin.divergence.across.byte_marginals import ByteSteps
from kd_plugin.divergence.listed import logprobs_of
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.views.align import Alignment
from kd_plugin.views.covers import ResponseSpans, Spans, byte_steps
from kd_plugin.views.projection import Places, Projection, project


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
        chunks, teachers, places, before = 0, [], [], 0
        for one in signals:
            teachers.append(one.teacher_chunks + chunks)
            places.append(one.places.shifted(chunks, before))
            chunks += int(one.places.count)
            before += len(one.tokens)
        return cls(
            signal, torch.cat([s.tokens for s in signals]), torch.cat(teachers), Places.joined(places),
            signals[0].projection, tuple(one for s in signals for one in s.responses),
        )  # fmt: skip

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


def chunk_signal(
    signal: HiddenSignal | SparseSignal,
    alignment: Alignment,
    positions: Sequence[int],
    projection: Projection,
    keeps: bool = True,
) -> ChunkSignal:
    """Return the signal of one row.

    Args:
        signal: the teacher's at :func:`asked_positions`.
        alignment: of the row's response.
        positions: scored offsets into the student's response.
        projection: between the two vocabularies.
        keeps: False where nothing of the row is compared.
    """
    device = signal.hidden.device if isinstance(signal, HiddenSignal) else signal.ids.device
    kept = alignment.kept(positions) if keeps else np.zeros(len(alignment), bool)
    number = np.where(kept, np.cumsum(kept) - 1, -1)
    student_chunks, teacher_chunks = alignment.student_chunks, alignment.teacher_chunks
    asked = np.flatnonzero(_number_of(number, teacher_chunks) >= 0)
    at = np.asarray(positions, np.int64).reshape(-1)
    begins = np.concatenate([[0], alignment.student_bytes])[at]
    # The teacher's token in which each student position lies: the last one that begins at or before it
    teacher_begins = np.concatenate([[0], alignment.teacher_bytes[:-1]])
    inside = np.searchsorted(teacher_begins, begins, side="right") - 1
    chunks = _number_of(number, student_chunks[at])
    texts = alignment.raw
    places = Places(
        torch.tensor(chunks, device=device),
        torch.tensor(np.where(chunks >= 0, np.searchsorted(asked, inside), -1), device=device),
        torch.tensor(alignment.student_bytes[at] >= alignment.teacher_bytes[inside], device=device),
        tuple(texts[teacher_begins[i] : b] if c >= 0 else b"" for i, b, c in zip(inside, begins, chunks, strict=True)),
        int(kept.sum()),
        tuple(len(list(alike)) for _, alike in groupby(chunks.tolist())),
    )
    tokens = torch.tensor(np.asarray(alignment.tokens, np.int64)[asked], device=device)
    belongs = torch.tensor(_number_of(number, teacher_chunks)[asked], device=device)
    response = ResponseSpans(
        texts,
        Spans(begins, alignment.student_bytes[at], chunks >= 0),
        Spans(teacher_begins[asked], alignment.teacher_bytes[asked], np.ones(len(asked), bool)),
    )
    return ChunkSignal(signal, tokens, belongs, places, projection, (response,))


def asked_positions(alignment: Alignment, positions: Sequence[int]) -> list[int]:
    """Return the offsets into the teacher's response at which it is asked: all of chunks that can be compared."""
    kept = alignment.kept(positions)
    number = np.where(kept, np.arange(len(kept)), -1)
    return np.flatnonzero(_number_of(number, alignment.teacher_chunks) >= 0).tolist()  # type: ignore[no-any-return]


def _number_of(number: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Return the number of some chunks, -1 for none."""
    if not len(number):
        return np.full(len(chunks), -1, np.int64)
    return np.where(chunks >= 0, number[np.maximum(chunks, 0)], -1)
