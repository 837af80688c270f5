"""A few log-probabilities out of a full distribution, chunk by chunk: what a server would have given.

Shape suffixes: N positions, R positions of a chunk, K listed tokens, E further tokens, V tokens, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kd_plugin.divergence.projection import (
    Projector,
    Workspace,
    autocast_dtype,
    chunk_rows,
    chunks,
    statistics_dtype,
)
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal


@torch.no_grad()
def top_tokens(signal: HiddenSignal, k: int) -> Tensor:
    """Return the ids (N, K) of the ``k`` likeliest tokens, or of all if there are fewer."""
    found = [logits_RV.topk(min(k, logits_RV.shape[1]), -1).indices for _, logits_RV in _projected(signal, 1.0)]
    return torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64, device=signal.hidden.device)


@torch.no_grad()
def logprobs_of(signal: HiddenSignal, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities (N,) of ``tokens`` (N,) at a temperature, in nats."""
    found = torch.zeros(len(signal), dtype=statistics_dtype(signal.hidden), device=tokens.device)
    for part, logits_RV in _projected(signal, temperature):
        found[part] = logits_RV.gather(1, tokens[part].unsqueeze(-1))[:, 0] - logits_RV.logsumexp(-1)
    return found


@torch.no_grad()
def listed_from(signal: HiddenSignal, k: int, further: Tensor, temperature: float) -> SparseSignal:
    """List the ``k`` likeliest tokens and some others, with the exact mass of the rest.

    Args:
        signal: the full distribution.
        k: tokens listed by their probability.
        further: (N, E) ids that are listed beside them; those that are listed already become padding.
        temperature: divides the logits.

    Returns:
        N positions with K + E entries.
    """
    ids, logprobs, tails = [], [], []
    for part, logits_RV in _projected(signal, temperature):
        top_RK = logits_RV.topk(min(k, logits_RV.shape[1]), -1).indices
        ids_RJ, again_RJ = joined_ids(top_RK, further[part].to(top_RK.device))
        logp_RV = logits_RV.sub_(logits_RV.logsumexp(-1, keepdim=True))
        listed_RJ = logp_RV.gather(1, ids_RJ)
        tails.append(logp_RV.scatter_(1, ids_RJ, -math.inf).logsumexp(-1))
        ids.append(ids_RJ)
        logprobs.append(listed_RJ.masked_fill(again_RJ, -math.inf))
    if not ids:
        empty = signal.hidden.new_zeros((0, k + further.shape[1]), dtype=statistics_dtype(signal.hidden))
        return SparseSignal(empty.long(), empty, empty.sum(1))
    return SparseSignal(torch.cat(ids), torch.cat(logprobs), torch.cat(tails))


def with_written(signal: SparseSignal, tokens: Tensor) -> SparseSignal:
    """List the written tokens (N,) too, taking their mass from the rest.

    What a server leaves for the rest is one minus a sum, so the written token may seem to have all of it or more; a
    small part of the rest then stays.
    """
    assert signal.written_logprobs is not None
    ids_NJ, again_NJ = joined_ids(signal.ids, tokens.unsqueeze(-1), listed=signal.logprobs != -math.inf)
    new_N = ~again_NJ[:, -1]
    written_N = torch.where(new_N, signal.written_logprobs.to(signal.logprobs.dtype), -math.inf)
    # A written token without probability takes nothing, also from a rest that is nothing
    share_N = torch.where(written_N > -math.inf, written_N - signal.tail_logmass, -math.inf).exp().clamp(max=1.0 - 1e-4)
    tail_N = torch.where(new_N, signal.tail_logmass + torch.log1p(-share_N), signal.tail_logmass)
    return SparseSignal(ids_NJ, torch.cat([signal.logprobs, written_N.unsqueeze(-1)], -1), tail_N)


def joined_ids(first: Tensor, second: Tensor, listed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Join ids (R, K) and (R, E) and flag those of the second that came before, as (R, K + E) each.

    Args:
        first: ids that differ within a row.
        second: further ids.
        listed: (R, K) which of ``first`` are tokens at all; None for all.
    """
    ids = torch.cat([first, second], -1)
    k = first.shape[1]
    same = second.unsqueeze(-1) == ids.unsqueeze(1)  # (R, E, K + E)
    if listed is not None:
        same[:, :, :k] &= listed.unsqueeze(1)
    earlier = torch.ones(second.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(k - 1)
    again = (same & earlier).any(-1)
    return ids, torch.cat([torch.zeros_like(first, dtype=torch.bool), again], -1)


def student_signal(hidden: Tensor, head: OutputHead) -> HiddenSignal:
    """Return the student's own distribution at some positions, without a gradient."""
    return HiddenSignal(hidden.detach(), head)


def _projected(signal: HiddenSignal, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of positions with their logits over the temperature, in a buffer that the next one overwrites."""
    hidden_NH = signal.hidden
    dtype = autocast_dtype(hidden_NH.device) or hidden_NH.dtype
    with torch.autocast(hidden_NH.device.type, enabled=False):
        head = signal.head.real_rows()
        rows = chunk_rows(head.weight.shape[0], hidden_NH.device)
        workspace = Workspace(min(rows, max(len(signal), 1)), head.weight.shape[0], hidden_NH.device)
        project = Projector(head, "logits", workspace, dtype, statistics_dtype(hidden_NH), temperature)
        for part in chunks(len(signal), rows):
            yield part, project(hidden_NH[part].to(dtype))
