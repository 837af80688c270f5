"""The panel's own next-token distribution, where a rollout needs it before there is a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.panel.scoring import score_rows
from kd_plugin.signals import HiddenSignal, SparseSignal


@torch.no_grad()
def panel_logprobs(
    panel: TeacherPanel,
    assignments: Sequence[Assignment],
    prefixes: Sequence[Sequence[int]],
    proposals: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    pad_token_id: int,
    device: torch.device,
    rows_at_once: int,
    step: int = 0,
) -> list[Tensor]:
    """Return log Σ wᵢ·pᵢ at each proposed token, the mixture of those who judge the row.

    Args:
        panel: the teachers.
        assignments: for each row who judges it.
        prefixes: token ids before the proposal.
        proposals: token ids whose places are judged; at least one a row.
        vocab_size: V.
        pad_token_id: fills up short rows.
        device: where the teachers take their inputs.
        rows_at_once: rows in a teacher's forward pass.
        step: optimizer step, for weights with a schedule.

    Returns:
        For each row (len(proposal), V) nats; ``-inf`` for what a teacher that lists only some tokens leaves out.
    """
    start, width = max(map(len, prefixes)), max(map(len, proposals))
    ids = torch.full((len(prefixes), start + width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (prefix, proposal) in enumerate(zip(prefixes, proposals, strict=True)):
        used = slice(start - len(prefix), start + len(proposal))
        ids[row, used] = torch.tensor([*prefix, *proposal])
        mask[row, used] = 1
    corrections = score_rows(
        panel,
        assignments,
        ids.to(device),
        mask.to(device),
        completion_start=start,
        positions=[range(len(proposal)) for proposal in proposals],
        rows_at_once=rows_at_once,
    )
    found = []
    for assignment, correction in zip(assignments, corrections, strict=True):
        weights = panel.weights_of(assignment, step)
        terms = [
            _logprobs(correction.signals[name], vocab_size) + torch.tensor(weight).log()
            for name, weight in zip(assignment.judges, weights, strict=True)
            if weight > 0
        ]
        found.append(torch.stack(terms).logsumexp(dim=0))
    return found


def _logprobs(signal: HiddenSignal | SparseSignal, vocab_size: int) -> Tensor:
    if isinstance(signal, HiddenSignal):
        return signal.head.logits(signal.hidden)[:, :vocab_size].float().log_softmax(dim=-1)
    full = signal.logprobs.new_full((len(signal), vocab_size), -torch.inf)
    return full.scatter_reduce(1, signal.ids, signal.logprobs, reduce="amax")
