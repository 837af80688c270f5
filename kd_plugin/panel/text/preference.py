"""Training on the pair of a correction and the response that it corrects: direct preference optimization.

With c the correction and r the response, both from where they depart, and the student's start as the reference:

    loss = -log sigmoid(beta * ((log q(c) - log q_start(c)) - (log q(r) - log q_start(r))))

(Rafailov et al., arXiv 2305.18290, eq. 7). What stands before the departure is common to both and cancels. A pair
counts as many times as it has tokens, so that the divisor is that of every other loss.

Shape suffixes: N scored positions of a micro-batch, H hidden width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.listed import logprobs_of
from kd_plugin.divergence.sparse import fused_sparse_divergence
from kd_plugin.errors import ConfigError
from kd_plugin.panel.batches import MicroBatch
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import text_weight
from kd_plugin.signals import HiddenSignal, OutputHead, TextSignal

SHARDED_REFERENCE = (
    "preference='dpo' keeps a whole copy of the student's start, and {} shard the student. Train on the correction "
    "itself (preference: null), or without sharding."
)


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a micro-batch's pairs.

    Attributes:
        loss_sum: scalar with a graph: each pair's loss times its tokens.
        margins: (pairs,) beta times the difference of log-ratios. Detached.
    """

    loss_sum: Tensor
    margins: Tensor


def preference_loss(
    panel: TeacherPanel, batch: MicroBatch, hidden: Tensor, head: OutputHead, tokens: Tensor, *, step: int
) -> PreferenceLoss | None:
    """Return the loss of a micro-batch's pairs; None where it has none.

    Args:
        panel: whose text teachers' weights count, and who says how far the student may go from its start.
        batch: with ``pairs``, and with the start's scores in ``anchor``.
        hidden: (N, H) the student's, at the scored positions.
        head: the student's.
        tokens: (N,) that are scored.
        step: optimizer step, for weights with a schedule.

    Raises:
        ConfigError: nothing gave the start's log-probabilities.
    """
    if not batch.pairs:
        return None
    beta = panel.text.preference_beta
    ends = list(itertools.accumulate(len(one.positions) for one in batch.scores))
    spans = [slice(end - len(one.positions), end) for end, one in zip(ends, batch.scores, strict=True)]
    rows = [row for pair in batch.pairs for row in pair]
    where = torch.cat([torch.arange(spans[row].start, spans[row].stop) for row in rows])
    where = where.to(hidden.device, non_blocking=True)
    counts = [len(batch.scores[row].positions) for row in rows]
    owners = [number for number, count in enumerate(counts) for _ in range(count)]  # which row each token is of
    owner = torch.tensor(owners, dtype=torch.int64).to(hidden.device, non_blocking=True)
    chosen, target = hidden.index_select(0, where), tokens.index_select(0, where)
    once = torch.ones(len(target), device=hidden.device)
    certain = TextSignal(target, once).as_list()
    with torch.no_grad():
        own = -fused_sparse_divergence(chosen.detach(), _frozen(head), certain, Divergence("forward_kl")).kd
        start = torch.cat([_start(batch, row, tokens[spans[row]]) for row in rows])
        ratios = torch.zeros(len(rows), dtype=own.dtype, device=own.device).index_add_(0, owner, own - start.to(own))
        margins = beta * (ratios[0::2] - ratios[1::2])
        size = torch.tensor([a + b for a, b in zip(counts[0::2], counts[1::2], strict=True)])
        weight = torch.tensor([text_weight(panel, batch.scores[a].assignment, step) for a, _ in batch.pairs])
        size, weight = (one.to(own, non_blocking=True) for one in (size, weight))
        value = (weight * size * torch.nn.functional.softplus(-margins)).sum()
        slope = weight * size * beta * torch.sigmoid(-margins)
        by_token = torch.stack([slope, -slope], dim=1).flatten()[owner]
    # Its gradient is that of the loss: each token's log-probability times the slope of its pair
    surrogate = fused_sparse_divergence(chosen, head, certain, Divergence("forward_kl"), weights=by_token).loss_sum
    return PreferenceLoss(surrogate - surrogate.detach() + value.to(surrogate), margins)


def _start(batch: MicroBatch, row: int, tokens: Tensor) -> Tensor:
    """Return the start's log-probabilities of a row's scored tokens, in nats."""
    if not tokens.numel():
        return torch.zeros(0, device=tokens.device)
    signal = batch.anchor[row].signals.get("start") if batch.anchor else None
    if not isinstance(signal, HiddenSignal):
        raise ConfigError("A preference needs the student's start, which nothing kept. Build the run with PanelRun.")
    return logprobs_of(signal, tokens, 1.0)


def _frozen(head: OutputHead) -> OutputHead:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)
