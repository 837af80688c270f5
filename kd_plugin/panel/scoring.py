"""Each teacher scores its rows, once for a generation batch, and positions are grouped by those that scored them.

Shape suffixes: B rows, L tokens, n_b scored positions of row b, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.divergence.modes import PanelGroup, TeacherTerm
from kd_plugin.errors import DataError
from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.rollouts.rows import Span, by_length, left_aligned, row_spans
from kd_plugin.sharding import most_of_any_rank
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal, TextSignal
from kd_plugin.teachers.base import Teacher, resident
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.views.render import Reader, Reading
from kd_plugin.vocab import SharedTokens, Vocabulary

Signal = HiddenSignal | SparseSignal | ChunkSignal


@dataclass(frozen=True)
class RowScores:
    """What the panel said of one row; of full distributions only hidden states are kept until the loss.

    Attributes:
        positions: the row's scored positions, as offsets into its completion.
        signals: teacher's name to its signal at those n_b positions.
        assignment: who scores the row, and what decides their weights.
        span: the columns of the generation batch that hold the row's tokens.
        prompts: what a teacher with a view read before the response, by name.
        covered: teacher's name to the positions that it says anything of, (n_b,) bool on the CPU; absent for all.
        weight: how often the row counts, by its reward.
    """

    positions: tuple[int, ...]
    signals: Mapping[str, Signal | TextSignal]
    assignment: Assignment
    span: Span
    prompts: Mapping[str, str] = field(default_factory=dict)
    covered: Mapping[str, Tensor] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def distributions(self) -> dict[str, Signal]:
        """The signals of those teachers that gave distributions."""
        return {name: one for name, one in self.signals.items() if not isinstance(one, TextSignal)}

    def with_heads(self, heads: Mapping[str, OutputHead]) -> RowScores:
        """Return the same with these output heads, which were gathered, in the signals of the teachers so named."""
        signals = dict(self.signals)
        for name in signals.keys() & heads.keys():
            signal, head = signals[name], heads[name]
            if isinstance(signal, HiddenSignal):
                signals[name] = replace(signal, head=replace(signal.head, weight=head.weight, bias=head.bias))
            elif isinstance(signal, ChunkSignal):
                signals[name] = signal.with_head(head)
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
        vocabulary: of the run: what a teacher says of tokens beyond is cut off, and one that shares a part of it is
            compared over that part. None leaves each teacher its own.
        rows: the B rows' columns, which readers render.
        readers: of those teachers that have a view, by name.

    Raises:
        DataError: a row holds a token that a head of the run has no row for, a prompt one that its teacher has not, or
            a row cannot be read under a view.

    Returns:
        One :class:`RowScores` a row, in order.
    """
    if vocabulary is not None and vocabulary.is_cut:
        vocabulary.require_rows(input_ids.masked_fill(attention_mask == 0, 0).tolist(), "Row")
    collected: list[dict[str, Signal]] = [{} for _ in assignments]
    prompts: list[dict[str, str]] = [{} for _ in assignments]
    covered: list[dict[str, Tensor]] = [{} for _ in assignments]
    readers = readers or {}
    own = {name for name, reader in readers.items() if reader.own_tokens}
    common = {} if vocabulary is None else shared_tokens(panel, vocabulary, own)
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
        reader = readers.get(name)
        if reader is not None and numbers:
            reading = reader.read([rows[b] for b in numbers], reading)
            for b, text in zip(numbers, reading.prompts or (), strict=True):
                prompts[b][name] = text
        shared = common.get(name)
        if shared is not None:
            reading, covers = _readable(reading, shared, name)
            for b, flags in zip(numbers, covers, strict=True):
                covered[b] |= {} if bool(flags.all()) else {name: flags}
        longest_first = by_length([span.length for span in reading.spans])
        at_once = rows_at_once if teacher.capabilities.in_process else max(len(numbers), 1)
        with clock(name) if clock is not None else nullcontext(), resident(teacher, input_ids.device):
            for start in range(0, len(numbers), at_once):
                chunk = longest_first[start : start + at_once]
                signal = _score(teacher, reading.select(chunk))
                if shared is not None:
                    signal = signal.over(shared)
                elif vocabulary is not None and name not in own and teacher.vocabulary.size > vocabulary.size:
                    signal = signal.within(vocabulary.size)
                counts = [len(reading.positions[r]) for r in chunk]
                if isinstance(signal, SparseSignal):
                    said: Sequence[HiddenSignal | SparseSignal] = signal.split(counts)
                else:
                    said = [replace(signal, hidden=piece) for piece in signal.hidden.split(counts)]
                pieces: Sequence[Signal] = said
                if reading.aligned is not None:
                    pieces = [ChunkSignal(piece, (reading.aligned[r],)) for r, piece in zip(chunk, said, strict=True)]
                for r, piece in zip(chunk, pieces, strict=True):
                    collected[numbers[r]][name] = piece
                    if isinstance(piece, ChunkSignal) and not bool(piece.counted.all()):
                        covered[numbers[r]][name] = piece.counted
            for _ in range(passes[name] - -(-len(numbers) // rows_at_once)):
                # Another rank has rows for this sharded teacher and waits for this one to gather with it
                nothing = torch.empty(0, dtype=torch.int64, device=input_ids.device)
                teacher.score(input_ids[:1, -1:], torch.ones_like(attention_mask[:1, -1:]), nothing)
    return [
        RowScores(tuple(p), {name: signals[name] for name in a.teachers if name in signals}, a, span, read, covers)
        for p, signals, a, span, read, covers in zip(
            positions, collected, assignments, spans, prompts, covered, strict=True
        )
    ]


def shared_tokens(panel: TeacherPanel, vocabulary: Vocabulary, own: Collection[str] = ()) -> dict[str, SharedTokens]:
    """Return what each teacher of another vocabulary shares with the student.

    A mixture of teachers is one distribution, so all of a panel that mixes are compared over what all share.

    Args:
        panel: the teachers.
        vocabulary: of the run.
        own: teachers that read tokens of their own, and share none.

    Raises:
        VocabularyError: a teacher shares too little.
    """
    found = {
        name: vocabulary.shared_with(teacher.vocabulary, "student", f"teacher {name!r}")
        for name, teacher in panel.teachers.items()
        if name not in own
    }
    if panel.mode.one_divergence and any(found.values()):
        own = {
            name: shared or SharedTokens(((0, vocabulary.size),), vocabulary.size, vocabulary.size)
            for name, shared in found.items()
        }
        found = {name: shared.within(own.values()) for name, shared in own.items()}
    return {name: shared for name, shared in found.items() if shared is not None}


def _readable(reading: Reading, shared: SharedTokens, name: str) -> tuple[Reading, list[Tensor]]:
    """Replace what a teacher cannot read: a row's tokens from the first on that it does not share with the student.

    Args:
        reading: the rows; those tokens become the last one before them.
        shared: what the teacher shares.
        name: of the teacher.

    Returns:
        The rows, and for each (n_b,) bool, the positions that the teacher covers: all up to that token, which its rest
        stands for.

    Raises:
        DataError: a prompt holds such a token.
    """
    ids, covers = reading.input_ids.clone(), []
    for row, (span, positions) in enumerate(zip(reading.spans, reading.positions, strict=True)):
        tokens = ids[row, span.first : span.stop].tolist()
        read = span.first + shared.readable(tokens)
        if read < reading.start:
            raise DataError(
                f"A prompt holds token {tokens[read - span.first]}, which teacher {name!r} has not, and cannot read. "
                "Let it read the prompt by its own chat template (view: {chat_template: own}), or take the token out "
                "of the prompts."
            )
        if read < span.stop:
            ids[row, read : span.stop] = ids[row, read - 1].clone()
        covers.append(torch.tensor([reading.start + c <= read for c in positions], dtype=torch.bool))
    return replace(reading, input_ids=ids), covers


def _score(teacher: Teacher, reading: Reading) -> HiddenSignal | SparseSignal:
    """Ask one teacher about some rows, without the columns that none of them uses."""
    ids, mask = left_aligned(reading.input_ids, reading.attention_mask, reading.spans)
    width, rows = ids.shape[1], zip(reading.spans, reading.positions, strict=True)
    flat = [r * width + reading.start - span.first + c - 1 for r, (span, at) in enumerate(rows) for c in at]
    positions = torch.tensor(flat, dtype=torch.int64)  # of rows without any, an empty list says no type
    return teacher.score(ids, mask, positions.to(ids.device, non_blocking=True))


def _passes(
    panel: TeacherPanel, rows_of: Mapping[str, Sequence[int]], rows_at_once: int, device: torch.device
) -> dict[str, int]:
    """Return how many passes each teacher makes on this rank: for a sharded one as many as on any rank."""
    own = {name: -(-len(rows) // rows_at_once) for name, rows in rows_of.items()}
    together = [name for name, teacher in panel.teachers.items() if teacher.capabilities.sharded]
    return own | dict(zip(together, most_of_any_rank([own[name] for name in together], device), strict=True))


def scored_positions(
    scores: Sequence[RowScores], width: int, device: torch.device, starts: Sequence[int] | None = None
) -> Tensor:
    """Return the scored positions of a micro-batch as indices into its flattened (rows * width) columns.

    Args:
        scores: one a row, in the order of the rows.
        width: columns of a row.
        device: where the student's hidden states are.
        starts: for each row the column that stands for the first token of its completion; left out, 0.

    Returns:
        (N,) int64, row by row; :func:`group_terms` counts positions in this order.
    """
    starts = [0] * len(scores) if starts is None else starts
    flat = [
        b * width + start + c
        for b, (start, row_scores) in enumerate(zip(starts, scores, strict=True))
        for c in row_scores.positions
    ]
    return torch.tensor(flat, dtype=torch.int64).to(device, non_blocking=True)


@dataclass(frozen=True)
class AskedTeacher:
    """One teacher's answer about the positions of a group.

    Attributes:
        teacher: its name.
        signal: at the group's n positions.
        weights: (n,) its weight at each of them.
    """

    teacher: str
    signal: Signal
    weights: Tensor


@dataclass(frozen=True)
class GroupTerms:
    """Positions that the same teachers scored.

    Attributes:
        positions: (n,) int64 among the N scored positions of the micro-batch, or None for all.
        terms: the teachers.
    """

    positions: Tensor | None
    terms: tuple[AskedTeacher, ...]


def group_terms(
    panel: TeacherPanel, scores: Sequence[RowScores], device: torch.device, step: int = 0
) -> list[GroupTerms]:
    """Group the N scored positions of a micro-batch by who scored them.

    A routed batch has one group a teacher, so that each head is used once; where all teachers score all rows
    there is one group, and the student is projected once for all of them.

    Args:
        panel: the teachers and their weights.
        scores: one a row, in the order of the rows.
        device: where the student's hidden states are.
        step: optimizer step, for weights with a schedule.

    Returns:
        Disjoint groups that together cover every position that a teacher scored or wrote.
    """
    starts, total = [], 0
    for row_scores in scores:
        starts.append(total)
        total += len(row_scores.positions)
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for b, row_scores in enumerate(scores):
        if row_scores.positions and row_scores.signals:
            rows_of.setdefault(tuple(row_scores.signals), []).append(b)

    groups = []
    for teachers, rows in rows_of.items():
        counts = [len(scores[b].positions) for b in rows]
        positions = None
        if sum(counts) != total:
            spans = [torch.arange(starts[b], starts[b] + len(scores[b].positions)) for b in rows]
            positions = torch.cat(spans).to(device, non_blocking=True)
        by_row = torch.tensor([_weights(panel, scores[b], teachers, step) for b in rows])
        by_position = by_row.repeat_interleave(torch.tensor(counts), dim=0, output_size=sum(counts))
        by_position = by_position.to(device, non_blocking=True)
        terms = [_asked(name, [scores[b] for b in rows], by_position[:, i]) for i, name in enumerate(teachers)]
        groups.append(GroupTerms(positions, tuple(terms)))
    return groups


def _weights(panel: TeacherPanel, scores: RowScores, teachers: Sequence[str], step: int) -> list[float]:
    """Return the weights of those teachers of a row that said something of it.

    A correction counts for all text teachers of its row, because all of them had a voice in it.
    """
    weights = dict(zip(scores.assignment.teachers, panel.weights_of(scores.assignment, step), strict=True))
    by_text = text_weight(panel, scores.assignment, step)
    return [by_text if name in panel.text_teachers else weights[name] * scores.weight for name in teachers]


def text_weight(panel: TeacherPanel, assignment: Assignment, step: int) -> float:
    """Return the weight of a row's text teachers together, at an optimizer step."""
    weights = zip(assignment.teachers, panel.weights_of(assignment, step), strict=True)
    return sum(weight for name, weight in weights if name in panel.text_teachers)


def _asked(name: str, rows: Sequence[RowScores], weights: Tensor) -> AskedTeacher:
    """Put what one teacher said of some rows after one another."""
    written = [one for row in rows if isinstance(one := row.signals[name], TextSignal)]
    if written:
        own = torch.cat([signal.weights for signal in written])
        return AskedTeacher(name, joined([signal.as_list() for signal in written]), weights * own)
    signals = joined([row.distributions[name] for row in rows])
    return AskedTeacher(name, signals, weights * _covered(rows, name, weights.device))


def panel_group(panel: TeacherPanel, group: GroupTerms, terms: Sequence[AskedTeacher]) -> PanelGroup:
    """Turn those ``terms`` of a group that gave hidden states into a group of the fused loss."""
    fused = []
    for term in terms:
        assert isinstance(term.signal, HiddenSignal)
        own = panel.own[term.teacher]
        fused.append(TeacherTerm(term.signal, term.weights, own.divergence, own.temperature))
    return PanelGroup(group.positions, tuple(fused), panel.combine, panel.confidence_temperature)


def joined(signals: Sequence[Signal]) -> Signal:
    """Put the positions of one teacher's rows after one another."""
    first = signals[0]
    if isinstance(first, ChunkSignal):
        return ChunkSignal.joined([s for s in signals if isinstance(s, ChunkSignal)])
    if isinstance(first, HiddenSignal):
        return replace(first, hidden=torch.cat([s.hidden for s in signals if isinstance(s, HiddenSignal)]))
    return SparseSignal.joined([s for s in signals if isinstance(s, SparseSignal)])


def _covered(rows: Sequence[RowScores], name: str, device: torch.device) -> Tensor | float:
    """Return (n,) 1 for positions of some rows that a teacher covers, 0 for others."""
    if not any(name in row.covered for row in rows):
        return 1.0
    flags = [row.covered.get(name, torch.ones(len(row.positions), dtype=torch.bool)) for row in rows]
    return torch.cat(flags).float().to(device, non_blocking=True)
