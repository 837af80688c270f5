"""What a teacher says of a response in tokens of its own, chunk by chunk.

Shape suffixes: n scored positions of the student, M positions of the teacher, k chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.divergence.across.byte_marginals import ByteSteps
from kd_plugin.divergence.listed import logprobs_of
from kd_plugin.divergence.reference import IMPOSSIBLE
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.views.aligned import Aligned, AlignedRows
from kd_plugin.views.covers import Side, byte_steps
from kd_plugin.views.projection import Places, Projection, project


@dataclass(frozen=True)
class ChunkSignal:
    """A teacher's signal at its own tokens of some responses, and how those belong to the student's scored positions.

    Attributes:
        signal: at the M teacher positions of the chunks that are compared, response by response.
        rows: the responses.
    """

    signal: HiddenSignal | SparseSignal
    rows: tuple[Aligned, ...]

    shared = None  # of tokens with equal ids; see the other signals

    def __len__(self) -> int:
        return sum(len(row.positions) for row in self.rows)

    @property
    def compared(self) -> Tensor:
        """(n,) bool on the CPU, the student positions that lie in a chunk that is compared."""
        return torch.from_numpy(np.concatenate([row.compared for row in self.rows]))

    @property
    def counted(self) -> Tensor:
        """(n,) bool on the CPU, the student positions that lie in a chunk, also one that the teacher cannot write."""
        return torch.from_numpy(np.concatenate([row.counted for row in self.rows]))

    @property
    def projection(self) -> Projection:
        """From the teacher's vocabulary to the student's."""
        return self.rows[0].projection

    @cached_property
    def tokens(self) -> Tensor:
        """(M,) int64 the teacher's token that stands next to each."""
        return self._on_device(self._joined.tokens)

    @cached_property
    def teacher_chunks(self) -> Tensor:
        """(M,) int64 the chunk of each of them."""
        return self._on_device(self._joined.teacher_chunks)

    @cached_property
    def places(self) -> Places:
        """Where the n student positions lie in the chunks and in the teacher's tokens."""
        joined = self._joined
        chunks, impossible = self._on_device(joined.chunks), self._on_device(joined.impossible)
        anchors, covers = self._on_device(joined.anchors), self._on_device(joined.covers)
        return Places(chunks, impossible, anchors, covers, joined.prefixes, joined.count, joined.sizes)

    @cached_property
    def _joined(self) -> AlignedRows:
        return AlignedRows.of(self.rows)

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        signal = self.signal
        device = signal.hidden.device if isinstance(signal, HiddenSignal) else signal.ids.device
        return torch.from_numpy(array).to(device, non_blocking=True)

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
        return cls(signal, tuple(row for s in signals for row in s.rows))

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
        """Return (n,) nats whose sums over the positions of each chunk are the teacher's of the chunk.

        What the teacher cannot have written is so likely as a divergence takes the impossible for.
        """
        logprobs = self.token_logprobs(temperature, name)
        sums = torch.zeros(self.places.count, dtype=logprobs.dtype, device=logprobs.device)
        sums.index_add_(0, self.teacher_chunks, logprobs)
        chunks, impossible = self.places.chunks, self.places.impossible
        found = torch.where(_begins(chunks), sums[chunks.clamp(min=0)] if len(sums) else 0.0, 0.0)
        return torch.where(_begins(impossible), math.log(IMPOSSIBLE), found)

    def byte_steps(self, student_tokens: Tensor) -> ByteSteps:
        """Return the bytes at which the teacher and the student can be compared.

        Args:
            student_tokens: (n,) that are scored.
        """
        student, teacher = self.projection.sorted_vocabularies
        joined = self._joined
        return byte_steps(
            joined.texts, Side(student, student_tokens.cpu().numpy(), joined.student),
            Side(teacher, joined.tokens, joined.teacher),
        )  # fmt: skip

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


def _begins(chunks: Tensor) -> Tensor:
    """Return (n,) bool, the first position of each chunk, where -1 stands for none."""
    first = chunks >= 0
    first[1:] &= chunks[1:] != chunks[:-1]
    return first
