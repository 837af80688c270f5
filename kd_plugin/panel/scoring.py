"""Ask each teacher about the rows that it judges, once for a generation batch.

Shape suffixes: B rows, L tokens, n_b scored positions of row b, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.signals import HiddenSignal


@dataclass(frozen=True)
class Correction:
    """What the panel said of one row; only hidden states at scored positions are kept until the loss.

    Attributes:
        positions: the row's scored positions, as offsets into its completion.
        signals: teacher's name to its signal at those positions, (n_b, H).
    """

    positions: tuple[int, ...]
    signals: Mapping[str, HiddenSignal]


@torch.no_grad()
def score_rows(
    panel: TeacherPanel,
    judges: Sequence[tuple[str, ...]],
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_start: int,
    positions: Sequence[Sequence[int]],
    rows_at_once: int,
) -> list[Correction]:
    """Collect the panel's judgement of a generation batch.

    Rows are grouped by teacher, and each group is cut to its own longest row, so a teacher never computes
    on columns that are padding for all of its rows.

    Args:
        panel: the teachers.
        judges: for each of the B rows the names of those who judge it.
        input_ids: (B, L) prompts padded on the left, then completions padded on the right.
        attention_mask: (B, L).
        completion_start: column of the first completion token; token ``c`` of a completion is predicted at
            column ``completion_start + c - 1``.
        positions: for each row the offsets c of the completion tokens that are trained on.
        rows_at_once: rows in a teacher's forward pass.

    Returns:
        One :class:`Correction` a row, in order.
    """
    collected: list[dict[str, HiddenSignal]] = [{} for _ in judges]
    first_columns, last_columns = _used_columns(attention_mask)
    for name, teacher in panel.teachers.items():
        rows = [b for b, names in enumerate(judges) if name in names and positions[b]]
        for start in range(0, len(rows), rows_at_once):
            chunk = rows[start : start + rows_at_once]
            left = min(first_columns[b] for b in chunk)
            right = max(last_columns[b] for b in chunk) + 1
            index = torch.tensor(chunk).to(input_ids.device, non_blocking=True)
            width = right - left
            flat = [r * width + completion_start + c - 1 - left for r, b in enumerate(chunk) for c in positions[b]]
            signal = teacher.score(
                input_ids[:, left:right].index_select(0, index),
                attention_mask[:, left:right].index_select(0, index),
                torch.tensor(flat).to(input_ids.device, non_blocking=True),
            )
            if not isinstance(signal, HiddenSignal):
                raise ConfigError(
                    f"Teacher {name!r} gives {type(signal).__name__}; the exact estimator needs a teacher in this "
                    "process, which gives hidden states."
                )
            pieces = signal.hidden.split([len(positions[b]) for b in chunk])
            for b, piece in zip(chunk, pieces, strict=True):
                collected[b][name] = HiddenSignal(piece, signal.head)
    return [Correction(tuple(p), s) for p, s in zip(positions, collected, strict=True)]


def _used_columns(attention_mask: Tensor) -> tuple[list[int], list[int]]:
    """Return for each row its first and its last column that is not padding; waits for the device once."""
    length = attention_mask.shape[1]
    used = attention_mask != 0
    first = used.int().argmax(dim=1)
    last = length - 1 - used.flip(1).int().argmax(dim=1)
    both = torch.stack([first, last]).tolist()
    return both[0], both[1]
