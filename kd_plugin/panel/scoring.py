"""Ask each teacher about the rows that it scores, once for a generation batch.

Shape suffixes: B rows, L tokens, n_b scored positions of row b, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.rollouts.rows import Span, by_length, left_aligned, row_spans
from kd_plugin.sharding.gathering import most_of_any_rank
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.teachers.base import Teacher, resident
from kd_plugin.views.render import Reader, Reading
from kd_plugin.vocab import Vocabulary


@dataclass(frozen=True)
class RowScores:
    """What the panel said of one row; of full distributions only hidden states are kept until the loss.

    Attributes:
        positions: the row's scored positions, as offsets into its completion.
        signals: teacher's name to its signal at those n_b positions.
        assignment: who scores the row, and what decides their weights.
        span: the columns of the generation batch that hold the row's tokens.
        prompts: what a teacher with a view read before the response, by name.
    """

    positions: tuple[int, ...]
    signals: Mapping[str, HiddenSignal | SparseSignal]
    assignment: Assignment
    span: Span
    prompts: Mapping[str, str] = field(default_factory=dict)

    def with_heads(self, heads: Mapping[str, OutputHead]) -> RowScores:
        """Return the same with these output heads, which were gathered, in the signals of the teachers so named."""
        signals = dict(self.signals)
        for name in signals.keys() & heads.keys():
            signal, head = signals[name], heads[name]
            if isinstance(signal, HiddenSignal):
                signals[name] = HiddenSignal(signal.hidden, replace(signal.head, weight=head.weight, bias=head.bias))
        return replace(self, signals=signals)


@torch.no_grad()
def score_rows(
    panel: TeacherPanel,
    assignments: Sequence[Assignment],
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_start: int,
    positions: Sequence[Sequence[int]],
    rows_at_once: int,
    clock: Callable[[str], AbstractContextManager[None]] | None = None,
    vocabulary: Vocabulary | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    readers: Mapping[str, Reader] | None = None,
) -> list[RowScores]:
    """Collect what the panel says of a generation batch.

    Rows are grouped by teacher, and within a teacher by length, so that a forward pass is as wide as the longest of
    rows that are alike. A teacher with a view reads its own prompts before the same responses. An offloaded teacher is
    moved in once, and out again.

    Args:
        panel: the teachers.
        assignments: for each of the B rows who scores it.
        input_ids: (B, L) prompts padded on the left, then completions padded on the right.
        attention_mask: (B, L).
        completion_start: column of the first completion token; token ``c`` of a completion is predicted at
            column ``completion_start + c - 1``.
        positions: for each row the offsets c of the completion tokens that are trained on.
        rows_at_once: rows in the forward pass of a teacher in this process; others get all rows at once.
        clock: entered with a teacher's name around all that it does.
        vocabulary: of the run: what a teacher says of tokens beyond is cut off. None leaves each teacher its own.
        rows: the B rows' columns, which readers render.
        readers: of those teachers that have a view, by name.

    Raises:
        DataError: a row holds a token that a head of the run has no row for, or cannot be read under a view.

    Returns:
        One :class:`RowScores` a row, in order.
    """
    if vocabulary is not None and vocabulary.is_cut:
        vocabulary.require_rows(input_ids.masked_fill(attention_mask == 0, 0).tolist(), "Row")
    collected: list[dict[str, HiddenSignal | SparseSignal]] = [{} for _ in assignments]
    prompts: list[dict[str, str]] = [{} for _ in assignments]
    spans = row_spans(attention_mask)
    plain = Reading(input_ids, attention_mask, completion_start, positions, spans)
    scored = {
        name: [b for b, one in enumerate(assignments) if name in one.teachers and positions[b]]
        for name in panel.teachers
    }
    passes = _passes(panel, scored, rows_at_once, input_ids.device)
    for name, teacher in panel.teachers.items():
        numbers = scored[name]
        if not passes[name]:
            continue
        reading = plain.select(numbers)
        reader = None if readers is None else readers.get(name)
        if reader is not None and numbers:
            reading = reader.read([rows[b] for b in numbers], reading)
            for b, text in zip(numbers, reading.prompts or (), strict=True):
                prompts[b][name] = text
        longest_first = by_length([span.length for span in reading.spans])
        at_once = rows_at_once if teacher.capabilities.in_process else max(len(numbers), 1)
        with clock(name) if clock is not None else nullcontext(), resident(teacher, input_ids.device):
            for start in range(0, len(numbers), at_once):
                chunk = longest_first[start : start + at_once]
                signal = _score(teacher, reading.select(chunk))
                if vocabulary is not None and teacher.vocabulary.size > vocabulary.size:
                    signal = signal.within(vocabulary.size)
                counts = [len(reading.positions[r]) for r in chunk]
                if isinstance(signal, SparseSignal):
                    pieces: Sequence[HiddenSignal | SparseSignal] = signal.split(counts)
                else:
                    pieces = [HiddenSignal(piece, signal.head) for piece in signal.hidden.split(counts)]
                for r, piece in zip(chunk, pieces, strict=True):
                    collected[numbers[r]][name] = piece
            for _ in range(passes[name] - -(-len(numbers) // rows_at_once)):
                # Another rank has rows for this sharded teacher and waits for this one to gather with it
                nothing = torch.empty(0, dtype=torch.int64, device=input_ids.device)
                teacher.score(input_ids[:1, -1:], torch.ones_like(attention_mask[:1, -1:]), nothing)
    return [
        RowScores(tuple(p), {name: signals[name] for name in a.teachers if name in signals}, a, span, read)
        for p, signals, a, span, read in zip(positions, collected, assignments, spans, prompts, strict=True)
    ]


def _score(teacher: Teacher, reading: Reading) -> HiddenSignal | SparseSignal:
    """Ask one teacher about some rows, without the columns that none of them uses."""
    ids, mask = left_aligned(reading.input_ids, reading.attention_mask, reading.spans)
    width, rows = ids.shape[1], zip(reading.spans, reading.positions, strict=True)
    flat = [r * width + reading.start - span.first + c - 1 for r, (span, at) in enumerate(rows) for c in at]
    return teacher.score(ids, mask, torch.tensor(flat).to(ids.device, non_blocking=True))


def _passes(
    panel: TeacherPanel, rows_of: Mapping[str, Sequence[int]], rows_at_once: int, device: torch.device
) -> dict[str, int]:
    """Return how many passes each teacher makes on this rank: for a sharded one as many as on any rank."""
    own = {name: -(-len(rows) // rows_at_once) for name, rows in rows_of.items()}
    together = [name for name, teacher in panel.teachers.items() if teacher.capabilities.sharded]
    return own | dict(zip(together, most_of_any_rank([own[name] for name in together], device), strict=True))
