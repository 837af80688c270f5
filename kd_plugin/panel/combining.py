"""Turn the panel's corrections of a micro-batch into the terms of one loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_plugin.divergence.fused import PanelGroup, TeacherTerm
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import Correction
from kd_plugin.signals import HiddenSignal


def scored_positions(corrections: Sequence[Correction], width: int, device: torch.device) -> Tensor:
    """Return the scored positions of a micro-batch as indices into its flattened (rows * width) completions.

    Args:
        corrections: one a row, in the order of the rows.
        width: padded length of the completions.
        device: where the student's hidden states are.

    Returns:
        (N,) int64, row by row; :func:`panel_groups` counts positions in this order.
    """
    flat = [b * width + c for b, correction in enumerate(corrections) for c in correction.positions]
    return torch.tensor(flat, dtype=torch.int64).to(device, non_blocking=True)


def panel_groups(panel: TeacherPanel, corrections: Sequence[Correction], device: torch.device) -> list[PanelGroup]:
    """Group the N scored positions of a micro-batch by who judged them.

    A routed batch has one group a teacher, so that each head is used once; where all teachers judge all rows
    there is one group, and the student is projected once for all of them.

    Args:
        panel: the teachers and their weights.
        corrections: one a row, in the order of the rows.
        device: where the student's hidden states are.

    Returns:
        Disjoint groups that together cover every position.
    """
    starts, total = [], 0
    for correction in corrections:
        starts.append(total)
        total += len(correction.positions)
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for b, correction in enumerate(corrections):
        if correction.positions:
            rows_of.setdefault(tuple(correction.signals), []).append(b)

    groups = []
    for judges, rows in rows_of.items():
        count = sum(len(corrections[b].positions) for b in rows)
        positions = None
        if count != total:
            spans = [torch.arange(starts[b], starts[b] + len(corrections[b].positions)) for b in rows]
            positions = torch.cat(spans).to(device, non_blocking=True)
        terms = []
        for name, weight in zip(judges, panel.weights_of(judges), strict=True):
            signals = [corrections[b].signals[name] for b in rows]
            hidden = torch.cat([signal.hidden for signal in signals])
            weights = None if weight == 1.0 else torch.full((count,), weight, device=device)
            terms.append(TeacherTerm(HiddenSignal(hidden, signals[0].head), weights))
        groups.append(PanelGroup(positions, tuple(terms)))
    return groups
