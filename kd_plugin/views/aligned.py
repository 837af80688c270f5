"""Responses in the student's tokens and in a teacher's: which chunks of them are compared, and where all tokens lie.

Shape suffixes: n scored positions of the student, m tokens of the teacher, M of them that are asked, k chunks, r rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kd_plugin.divergence.across.sorted_tokens import Flags, Ints
from kd_plugin.views.align import Alignment
from kd_plugin.views.covers import Spans, Texts
from kd_plugin.views.projection import Projection


@dataclass(frozen=True)
class Aligned:
    """A response in the student's tokens and in a teacher's, and the chunks of it that are compared.

    Attributes:
        alignment: of the two.
        positions: (n,) scored offsets into the student's response.
        projection: from the teacher's vocabulary to the student's.
        kept: (k + 1,) bool, which chunks are compared; the last stands for what is in none.
        impossible: (k + 1,) bool, which chunks the teacher cannot have written.
        comparable: how many student tokens lie in chunks that can be compared.
    """

    alignment: Alignment
    positions: Ints
    projection: Projection
    kept: Flags
    impossible: Flags
    comparable: int

    @classmethod
    def of(
        cls, alignment: Alignment, positions: Sequence[int], projection: Projection, min_coverage: float = 0.0
    ) -> Aligned:
        """Compare what can be compared; nothing where that is less than a share of the scored tokens."""
        at = np.asarray(positions, np.int64).reshape(-1)
        kept, impossible = alignment.of_used(at)
        comparable = int(alignment.student_sizes[kept].sum())
        return cls(alignment, at, projection, kept & (comparable >= min_coverage * len(at)), impossible, comparable)

    @property
    def is_compared(self) -> bool:
        """Whether anything is."""
        return bool(self.kept.any())

    @property
    def compared(self) -> Flags:
        """(n,) bool, the scored positions that lie in a chunk that is compared."""
        return self.kept.repeat(self.alignment.student_sizes)[self.positions]

    @cached_property
    def counted(self) -> Flags:
        """(n,) bool, the scored positions that lie in a chunk that is compared or that is impossible."""
        return (self.kept | self.impossible).repeat(self.alignment.student_sizes)[self.positions]

    @cached_property
    def asked(self) -> Ints:
        """(M,) offsets into the teacher's response at which it is asked: all of the chunks that are compared."""
        return self.kept.repeat(self.alignment.teacher_sizes).nonzero()[0]


@dataclass(frozen=True)
class AlignedRows:
    """Where tokens of both sides lie in the text of some responses, and in their chunks, which are numbered through.

    Attributes:
        texts: the responses.
        student: the n scored tokens of the student.
        teacher: the M tokens of the teacher.
        tokens: (M,) the latter's ids.
        chunks: (n,) the chunk of each scored token, of those that are compared; -1 for none.
        impossible: (n,) the chunk of each of those that the teacher cannot have written; -1 for none.
        teacher_chunks: (M,) the chunk of each of the teacher's.
        count: k.
        anchors: (n,) the teacher's token in which each student token begins, among the M; -1 for none.
        covers: (n,) bool, whether the student's token reaches to the end of that token or beyond.
        begins: (n,) where that token begins.
        rows: (n,) the response of each.
    """

    texts: Texts
    student: Spans
    teacher: Spans
    tokens: Ints
    chunks: Ints
    impossible: Ints
    teacher_chunks: Ints
    count: int
    anchors: Ints
    covers: Flags
    begins: Ints
    rows: Ints

    @classmethod
    def of(cls, aligned: Sequence[Aligned]) -> AlignedRows:
        """Put responses after one another."""
        alignments = [one.alignment for one in aligned]
        texts = Texts.of([one.raw for one in alignments])
        at, rows = _after_one_another(
            [one.positions for one in aligned], np.array([len(one.student_bytes) for one in alignments])
        )
        begins, ends = _spans([one.student_bytes for one in alignments], texts)
        teacher_begins, teacher_ends = _spans([one.teacher_bytes for one in alignments], texts)
        kept = np.concatenate([one.kept for one in aligned])
        numbers = np.where(kept, kept.cumsum() - 1, -1)
        teacher_chunks = numbers.repeat(np.concatenate([one.teacher_sizes for one in alignments]))
        asked = (teacher_chunks >= 0).nonzero()[0]
        sizes = np.concatenate([one.student_sizes for one in alignments])
        chunks = numbers.repeat(sizes)[at]
        flags = np.concatenate([one.impossible for one in aligned])
        impossible = np.where(flags, flags.cumsum() - 1, -1).repeat(sizes)[at]
        student = Spans(begins[at], ends[at], chunks >= 0)
        # The teacher's token in which each student position lies: the last one that begins at or before it
        inside = teacher_begins.searchsorted(student.begins, side="right") - 1
        tokens = np.array([token for one in alignments for token in one.tokens], np.int64)
        return cls(
            texts,
            student,
            Spans(teacher_begins[asked], teacher_ends[asked], np.ones(len(asked), bool)),
            tokens[asked],
            chunks,
            impossible,
            teacher_chunks[asked],
            int(kept.sum()),
            np.where(student.used, asked.searchsorted(inside), -1),
            student.ends >= teacher_ends[inside] if len(tokens) else np.zeros(len(at), bool),
            teacher_begins[inside] if len(tokens) else student.begins,
            rows,
        )

    @property
    def prefixes(self) -> tuple[bytes, ...]:
        """(n,) the bytes between the beginning of the teacher's token and the student's position."""
        raw = self.texts.raw.tobytes()
        stops = np.where(self.student.used, self.student.begins, 0)
        return tuple(raw[first:stop] for first, stop in zip(self.begins.tolist(), stops.tolist(), strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many positions in a row are of one chunk, or of none."""
        numbers = np.stack([self.chunks, self.impossible, self.rows])
        changes = (numbers[:, 1:] != numbers[:, :-1]).any(0)
        edges = np.concatenate([[0], changes.nonzero()[0] + 1, [len(self.chunks)]])
        return tuple(np.diff(edges).tolist()) if len(self.chunks) else ()


def _after_one_another(numbers: Sequence[Ints], counts: Ints) -> tuple[Ints, Ints]:
    """Join numbers of things, of which each row has so many; return them, and the row of each."""
    rows = np.arange(len(counts)).repeat([len(one) for one in numbers])
    return np.concatenate(numbers) + (counts.cumsum() - counts)[rows], rows


def _spans(ends: Sequence[Ints], texts: Texts) -> tuple[Ints, Ints]:
    """Return where the tokens of all rows begin and end in the texts, from their ends in the responses."""
    counts = np.array([len(one) for one in ends])
    joined = np.concatenate(ends) + (texts.starts + 1).repeat(counts)
    begins = np.concatenate([[0], joined[:-1]])[: len(joined)]
    firsts = (counts.cumsum() - counts)[counts > 0]
    begins[firsts] = (texts.starts + 1)[counts > 0]
    return begins, joined
