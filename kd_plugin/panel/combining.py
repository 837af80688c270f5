"""Group the scored positions of a micro-batch by the teachers that scored them, with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.divergence.groups import PanelGroup, TeacherTerm
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import RowScores
from kd_plugin.signals import HiddenSignal, SparseSignal


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
    signal: HiddenSignal | SparseSignal
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
        Disjoint groups that together cover every position.
    """
    starts, total = [], 0
    for row_scores in scores:
        starts.append(total)
        total += len(row_scores.positions)
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for b, row_scores in enumerate(scores):
        if row_scores.positions:
            rows_of.setdefault(tuple(row_scores.signals), []).append(b)

    groups = []
    for teachers, rows in rows_of.items():
        counts = torch.tensor([len(scores[b].positions) for b in rows])
        positions = None
        if int(counts.sum()) != total:
            spans = [torch.arange(starts[b], starts[b] + len(scores[b].positions)) for b in rows]
            positions = torch.cat(spans).to(device, non_blocking=True)
        by_row = torch.tensor([panel.weights_of(scores[b].assignment, step) for b in rows])
        by_position = by_row.repeat_interleave(counts, dim=0).to(device, non_blocking=True)
        terms = [
            AskedTeacher(name, joined([scores[b].signals[name] for b in rows]), by_position[:, i])
            for i, name in enumerate(teachers)
        ]
        groups.append(GroupTerms(positions, tuple(terms)))
    return groups


def panel_group(panel: TeacherPanel, group: GroupTerms, terms: Sequence[AskedTeacher]) -> PanelGroup:
    """Turn those ``terms`` of a group that gave hidden states into a group of the fused loss."""
    fused = []
    for term in terms:
        assert isinstance(term.signal, HiddenSignal)
        own = panel.own[term.teacher]
        fused.append(TeacherTerm(term.signal, term.weights, own.divergence, own.temperature))
    return PanelGroup(group.positions, tuple(fused), panel.combine, panel.confidence_temperature)


def joined(signals: Sequence[HiddenSignal | SparseSignal]) -> HiddenSignal | SparseSignal:
    """Put the positions of one teacher's rows after one another."""
    first = signals[0]
    if isinstance(first, HiddenSignal):
        return HiddenSignal(torch.cat([s.hidden for s in signals if isinstance(s, HiddenSignal)]), first.head)
    return SparseSignal.joined([s for s in signals if isinstance(s, SparseSignal)])
