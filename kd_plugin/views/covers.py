"""How the tokens of both sides lie over the bytes of a response, for the comparison byte by byte.

Shape suffixes: n tokens of the student, m of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kd_plugin.divergence.across.byte_marginals import ByteSteps, Covers
from kd_plugin.divergence.across.byte_masses import Ranges, SortedTokens
from kd_plugin.views.tokens import Ints


@dataclass(frozen=True)
class Spans:
    """The tokens of one side in the bytes of one response.

    Attributes:
        begins: (n,) where each begins.
        ends: (n,) where each ends; of the token that ends the response one byte behind the text.
        used: (n,) bool, those that are compared.
    """

    begins: Ints
    ends: Ints
    used: np.ndarray


@dataclass(frozen=True)
class ResponseSpans:
    """A response as both sides' tokens; the teacher's are those that it was asked about."""

    raw: bytes
    student: Spans
    teacher: Spans


class _Side:
    """Collects the covers of one side, response by response; bytes are numbered through.

    Args:
        table: its vocabulary.
        tokens: of all responses.
        crosses: whether a token is also asked about bytes behind its end; else it answers for itself alone.
    """

    def __init__(self, table: SortedTokens, tokens: list[int], crosses: bool) -> None:
        self.table, self.tokens, self.crosses = table, tokens, crosses
        self.known = np.zeros(len(tokens), bool)
        self.begun: list[tuple[int, int]] = []  # row, byte
        self.after: list[tuple[int, int, int, int, int, bool]] = []  # row, byte, first, stop, depth, open
        self.row = 0

    def add(self, raw: bytes, spans: Spans, offset: int) -> None:
        """Add a response whose bytes are numbered from ``offset``; the first is a space before the text."""
        begins, ends, used = (spans.begins + 1).tolist(), (spans.ends + 1).tolist(), spans.used.tolist()
        tokens, known, row = self.tokens[self.row : self.row + len(begins)], [], self.row
        for at, (token, begin, end) in enumerate(zip(tokens, begins, ends, strict=True)):
            text = self.table.texts[token] if token < len(self.table.texts) else None
            if begin == 1 and text == raw[:end]:
                begin = begins[at] = 0  # its own leading space
            is_end = token == self.table.end and begin == len(raw)
            known.append(used[at] and (is_end or (text is not None and text == raw[begin:end])))
        stop = len(begins)
        for at in range(len(begins) - 1, -1, -1):
            if not known[at]:
                continue
            follows = at + 1 < len(begins) and known[at + 1] and begins[at + 1] == ends[at]
            if not follows:
                stop = at + 1
            self.begun.append((row + at, offset + begins[at]))
            limit = min(ends[stop - 1] if self.crosses else ends[at], len(raw))
            self._walk(raw, row + at, begins[at], limit, offset, ends[at] if follows else None)
        self.known[row : row + len(known)] = known
        self.row += len(begins)

    def _walk(self, raw: bytes, row: int, begin: int, limit: int, offset: int, resolved: int | None) -> None:
        """Note the tokens that go on behind the bytes from ``begin``, for every byte up to ``limit``."""
        for byte in range(begin + 1, limit + 1):
            same, longer, past = self.table.find(raw[begin:byte])
            is_open = longer > same and not (self.crosses and byte == resolved)
            goes_on = past > longer
            if (goes_on or is_open) if self.crosses else self.table.branches(same, longer, past, byte - begin):
                self.after.append((row, offset + byte, same, past, byte - begin, is_open))
            if not goes_on:
                break

    def arrays(self) -> tuple[Ints, Ints]:
        """Return (n, 2) and (E, 6) int64, what was noted, by rows."""
        begun = np.array(self.begun, np.int64).reshape(-1, 2)
        after = np.array(self.after, np.int64).reshape(-1, 6)
        return begun[np.argsort(begun[:, 0])], after[np.argsort(after[:, 0], kind="stable")]

    def covers(self, begun: Ints, after: Ints, numbers: Ints) -> Covers:
        """Return the covers of those bytes that are in ``numbers``, which they are counted by."""

        def numbered(at: Ints) -> tuple[Ints, Ints]:
            place = np.minimum(np.searchsorted(numbers, at), max(len(numbers) - 1, 0))
            here = np.flatnonzero(numbers[place] == at) if len(numbers) else np.zeros(0, np.int64)
            return place[here], here

        at_n, here_n = numbered(begun[:, 1])
        at_E, here_E = numbered(after[:, 1])
        after = after[here_E]
        columns = (after[:, 0], at_E, after[:, 2], after[:, 3], after[:, 4])
        ranges = Ranges(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
        rows, known = torch.from_numpy(np.ascontiguousarray(begun[here_n, 0])), torch.from_numpy(self.known)
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        is_open = torch.from_numpy(after[:, 5] > 0)
        return Covers(self.table, tokens, known, rows, torch.from_numpy(at_n), ranges, is_open)


def byte_steps(
    responses: Sequence[ResponseSpans],
    student: SortedTokens,
    student_tokens: list[int],
    teacher: SortedTokens,
    teacher_tokens: list[int],
) -> ByteSteps:
    """Return where the choices of a student can be compared with a teacher, over the bytes of some responses.

    Args:
        responses: after one another.
        student: its vocabulary.
        student_tokens: of all responses.
        teacher: its vocabulary.
        teacher_tokens: of all responses, those that it was asked about.
    """
    mine, theirs = _Side(student, student_tokens, crosses=False), _Side(teacher, teacher_tokens, crosses=True)
    offset = 0
    for one in responses:
        raw = b" " + one.raw
        mine.add(raw, one.student, offset)
        theirs.add(raw, one.teacher, offset)
        offset += len(raw) + 2
    own, said = mine.arrays(), theirs.arrays()
    numbers = np.intersect1d(
        np.concatenate([own[0][:, 1], own[1][:, 1]]), np.concatenate([said[0][:, 1], said[1][:, 1]])
    )
    return ByteSteps(mine.covers(*own, numbers), theirs.covers(*said, numbers), len(numbers))
