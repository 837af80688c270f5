"""Sparse targets as a coarse distribution: the K listed tokens, and one outcome for all the rest.

From a full distribution such targets are taken chunk by chunk, as a server would give them.

Shape suffixes: N positions, R positions of a chunk, K listed tokens, E further tokens, J = K + 1 outcomes (the last is
the rest), V tokens, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kd_plugin.divergence.across.folding import Folding
from kd_plugin.divergence.projection import (
    Projector,
    Workspace,
    autocast_dtype,
    chunk_rows,
    chunks,
    statistics_dtype,
)
from kd_plugin.divergence.reference import IMPOSSIBLE, from_logprobs
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal, shared_mask
from kd_plugin.vocab import SharedTokens

Tail = Literal["bucket", "keep", "renormalise"]
# Log-probability given on both sides to an outcome that neither side can produce (padding, an empty rest): it adds
# exactly 0 to every divergence and its gradient, where -inf would add inf - inf.
_ABSENT = -1e4


@torch.no_grad()
def top_tokens(signal: HiddenSignal, k: int) -> Tensor:
    """Return the ids (N, K) of the ``k`` likeliest tokens, of those that are shared; of all if there are fewer."""
    found = [_top(logits_RV, k, signal.shared) for _, logits_RV in _projected(signal, 1.0)]
    return torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64, device=signal.hidden.device)


@torch.no_grad()
def logprobs_of(signal: HiddenSignal, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities (N,) of ``tokens`` (N,) at a temperature, in nats.

    A token that a teacher of another vocabulary does not share stands for all of its rest, a millionth where it has
    none.
    """
    found = torch.zeros(len(signal), dtype=statistics_dtype(signal.hidden), device=tokens.device)
    shared = signal.shared
    for part, logits_RV in _projected(signal, temperature):
        columns_R = tokens[part]
        if shared is not None:
            least = 0.0 if shared.teacher_has_rest else IMPOSSIBLE
            folding = Folding(shared, shared.teacher_size, least, logits_RV.device)
            logits_RV = folding.fold(logits_RV, logits_RV.new_empty(len(logits_RV), folding.outcomes))
            columns_R = folding.columns(columns_R)
        found[part] = logits_RV.gather(1, columns_R.unsqueeze(-1))[:, 0] - logits_RV.logsumexp(-1)
    return found


@torch.no_grad()
def listed_from(signal: HiddenSignal, k: int, further: Tensor, temperature: float) -> SparseSignal:
    """List the ``k`` likeliest tokens and some others, with the exact mass of the rest.

    Args:
        signal: the full distribution. Of a teacher with another vocabulary shared tokens are listed.
        k: tokens listed by their probability.
        further: (N, E) ids that are listed beside them; those that are listed already, or not shared, become padding.
        temperature: divides the logits.

    Returns:
        N positions with K + E entries.
    """
    ids, logprobs, tails = [], [], []
    for part, logits_RV in _projected(signal, temperature):
        top_RK = _top(logits_RV, k, signal.shared)
        further_RE = further[part].to(top_RK.device)
        if signal.shared is not None:
            further_RE = torch.where(shared_mask(signal.shared, further_RE), further_RE, top_RK[:, :1])
        ids_RJ, again_RJ = joined_ids(top_RK, further_RE)
        logp_RV = logits_RV.sub_(logits_RV.logsumexp(-1, keepdim=True))
        listed_RJ = logp_RV.gather(1, ids_RJ)
        tails.append(logp_RV.scatter_(1, ids_RJ, -math.inf).logsumexp(-1))
        ids.append(ids_RJ)
        logprobs.append(listed_RJ.masked_fill(again_RJ, -math.inf))
    if not ids:
        empty = signal.hidden.new_zeros((0, k + further.shape[1]), dtype=statistics_dtype(signal.hidden))
        return SparseSignal(empty.long(), empty, empty.sum(1), shared=signal.shared)
    return SparseSignal(torch.cat(ids), torch.cat(logprobs), torch.cat(tails), shared=signal.shared)


def _top(logits_RV: Tensor, k: int, shared: SharedTokens | None) -> Tensor:
    """Return the ids (R, K) of the likeliest tokens, of those that are shared."""
    if shared is None:
        return logits_RV.topk(min(k, logits_RV.shape[1]), -1).indices
    ids = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return logits_RV.masked_fill(~shared_mask(shared, ids), -math.inf).topk(min(k, shared.count), -1).indices


def with_sampled_token(signal: SparseSignal, tokens: Tensor) -> SparseSignal:
    """List the sampled tokens (N,) too, taking their mass from the rest.

    What a server leaves for the rest is one minus a sum, so the sampled token may seem to have all of it or more; a
    small part of the rest then stays.
    """
    assert signal.sampled_token_logprobs is not None
    ids_NJ, again_NJ = joined_ids(signal.ids, tokens.unsqueeze(-1), listed=signal.logprobs != -math.inf)
    new_N = ~again_NJ[:, -1]
    if signal.shared is not None:
        new_N = new_N & shared_mask(signal.shared, tokens)  # another stands for what is not listed
    written_N = torch.where(new_N, signal.sampled_token_logprobs.to(signal.logprobs.dtype), -math.inf)
    # A sampled token without probability takes nothing, also from a rest that is nothing
    share_N = torch.where(written_N > -math.inf, written_N - signal.tail_logmass, -math.inf).exp().clamp(max=1.0 - 1e-4)
    tail_N = torch.where(new_N, signal.tail_logmass + torch.log1p(-share_N), signal.tail_logmass)
    ids_NJ[:, -1].masked_fill_(~new_N, 0)
    logprobs_NJ = torch.cat([signal.logprobs, written_N.unsqueeze(-1)], -1)
    return SparseSignal(ids_NJ, logprobs_NJ, tail_N, shared=signal.shared)


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


@dataclass(frozen=True)
class CoarseTarget:
    """Targets of some positions, made safe to gather and scatter with.

    Attributes:
        ids_NK: token ids; padding repeats the position's first real token, so that a scatter of equal values
            writes it twice and nothing else.
        source_NK: for each entry, the entry that it repeats: itself, or the first real one for padding.
        logp_NK: teacher's log-probabilities in nats; -inf for padding.
        tail_N1: log of the mass not listed.
        draws_NK: counts of sampled targets, or None.
        any_N1: whether the position has a real entry at all.
        shared: where the teacher has another vocabulary, what both share.
    """

    ids_NK: Tensor
    source_NK: Tensor
    logp_NK: Tensor
    tail_N1: Tensor
    draws_NK: Tensor | None
    any_N1: Tensor
    shared: SharedTokens | None = None

    @classmethod
    def from_signal(cls, signal: SparseSignal, dtype: torch.dtype) -> CoarseTarget:
        """Prepare ``signal``; log-probabilities become ``dtype``."""
        real_NK = signal.logprobs != -math.inf
        first_N1 = real_NK.to(torch.uint8).argmax(-1, keepdim=True)
        entries_1K = torch.arange(signal.ids.shape[1], device=signal.ids.device).unsqueeze(0)
        source_NK = torch.where(real_NK, entries_1K, first_N1)
        any_N1 = real_NK.any(-1, keepdim=True)
        ids_NK = torch.where(any_N1, signal.ids.to(torch.int64).gather(1, source_NK), 0)
        draws = None if signal.draws is None else signal.draws.to(dtype)
        logprobs, tail_N1 = signal.logprobs.to(dtype), signal.tail_logmass.to(dtype)[:, None]
        return cls(ids_NK, source_NK, logprobs, tail_N1, draws, any_N1, signal.shared)

    def __getitem__(self, part: slice) -> CoarseTarget:
        draws = None if self.draws_NK is None else self.draws_NK[part]
        ids_NK, source_NK, logp_NK = self.ids_NK[part], self.source_NK[part], self.logp_NK[part]
        return CoarseTarget(ids_NK, source_NK, logp_NK, self.tail_N1[part], draws, self.any_N1[part], self.shared)

    def spread(self, values_NK: Tensor, otherwise_NK: Tensor) -> Tensor:
        """Values to scatter at ``ids_NK``: each entry's own, or ``otherwise`` where the position lists nothing."""
        return torch.where(self.any_N1, values_NK.gather(1, self.source_NK), otherwise_NK)


def check_tail(tail: str, divergence: Divergence, sampled: bool) -> None:
    """Refuse combinations of tail, divergence and kind of target that have no meaning.

    Raises:
        ConfigError: says which and why.
    """
    if tail not in get_args(Tail):
        raise ConfigError(f"Unknown tail {tail!r}; expected one of {', '.join(get_args(Tail))}.")
    if sampled and divergence.name != "forward_kl":
        raise ConfigError(
            f"{divergence.name} cannot be computed from sampled targets: their counts are an unbiased estimate of an "
            "expectation under the teacher, which only forward_kl is. Use forward_kl, or capture top-k targets."
        )
    if sampled and tail != "bucket":
        raise ConfigError(
            f"tail={tail!r} was given for sampled targets, which have no tail: counts already estimate the whole "
            "distribution. Leave tail at its default."
        )
    if tail != "bucket" and divergence.name != "forward_kl":
        raise ConfigError(
            f"tail={tail!r} is defined for forward_kl only, got {divergence.name}: it leaves the student's mass on "
            'unlisted tokens out, which every other divergence must weigh. Use tail="bucket".'
        )


def listed_divergence(
    target: CoarseTarget, logq_NJ: Tensor, divergence: Divergence, tail: str, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence of coarse distributions, and its derivative in the student's coarse log-probabilities.

    Args:
        target: the teacher's side.
        logq_NJ: student's log-probabilities of the listed tokens and of the rest; -inf where there is none.
        divergence: which divergence.
        tail: how the rest is treated.
        need_grad: whether to differentiate.

    Returns:
        (N,) nats, and (N, J) dD/dlogq or None. Derivatives of the formulas in ``reference`` are autograd's: the
        tensors are small, and the formulas stay in one place.
    """
    logp_NK = target.logp_NK
    if target.draws_NK is not None or tail != "bucket":
        if target.draws_NK is not None:
            weight_NK = target.draws_NK / target.draws_NK.sum(-1, keepdim=True)
        else:
            if tail == "renormalise":
                logp_NK = logp_NK - logp_NK.logsumexp(-1, keepdim=True)
            weight_NK = logp_NK.exp()
        padding_NK = target.logp_NK == -math.inf
        gap_NK = torch.where(padding_NK, 0.0, logp_NK - torch.where(padding_NK, 0.0, logq_NJ[:, :-1]))
        slope_NJ = torch.cat([-weight_NK, torch.zeros_like(target.tail_N1)], -1) if need_grad else None
        return (weight_NK * gap_NK).sum(-1), slope_NJ
    logp_NJ = torch.cat([logp_NK, target.tail_N1], -1)
    if divergence.kind.covers_teacher(divergence):
        # All of the student's tokens are listed: what the teacher has beside them is given up, and not infinite
        logp_NJ = _given_listed(logp_NJ, (logq_NJ[:, -1:] == -math.inf) & (target.tail_N1 > -math.inf))
    least = None
    if target.shared is not None:
        least = divergence.least_rest(target.shared.student_has_rest, target.shared.teacher_has_rest)
    if least:
        least_N1 = logp_NK.logsumexp(-1, keepdim=True) + math.log(least)
        logp_NJ = torch.cat([logp_NK, torch.maximum(target.tail_N1, least_N1)], -1).log_softmax(-1)
    return _compared(logp_NJ, logq_NJ, divergence, need_grad)


def _given_listed(logprobs_NJ: Tensor, impossible_N1: Tensor) -> Tensor:
    """Where the last outcome is impossible to the other side, return log-probabilities given that it is another."""
    listed_NK = logprobs_NJ[:, :-1]
    given_NK = torch.where(impossible_N1, listed_NK - listed_NK.logsumexp(-1, keepdim=True), listed_NK)
    return torch.cat([given_NK, logprobs_NJ[:, -1:].masked_fill(impossible_N1, -math.inf)], -1)


def _compared(
    logp_NJ: Tensor, logq_NJ: Tensor, divergence: Divergence, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    absent_NJ = (logp_NJ == -math.inf) & (logq_NJ == -math.inf)
    logp_NJ, logq_NJ = logp_NJ.masked_fill(absent_NJ, _ABSENT), logq_NJ.masked_fill(absent_NJ, _ABSENT)
    if not need_grad:
        return from_logprobs(logq_NJ, logp_NJ, divergence), None
    with torch.enable_grad():
        leaf_NJ = logq_NJ.detach().requires_grad_()
        value_N = from_logprobs(leaf_NJ, logp_NJ, divergence)
        (slope_NJ,) = torch.autograd.grad(value_N.sum(), leaf_NJ)
    return value_N.detach(), slope_NJ
