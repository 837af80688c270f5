"""From last hidden states to the stored targets: the hot loop of a capture.

Shape suffixes: N scored positions, V vocabulary, K listed tokens, D draws, G groups of consecutive tokens.
Log-softmax is taken in float32 over the tokenizer's vocabulary; logits exist for one chunk of positions at a
time, nothing waits for the device within a chunk, and one transfer a chunk brings the results to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.targets import Sampled, Targets, TopK, TopP
from kd_plugin.errors import NonFiniteError
from kd_plugin.signals import OutputHead

_GROUP = 64  # tokens a group: the maximum (or sum) of each group narrows the search down
# Float32 logits of a chunk. On a CPU a chunk is projected at once, since that reads the whole head, and then taken
# apart in parts that stay in its cache.
_PART_BYTES_CPU = 8 << 20
_CHUNK_BYTES_CPU, _CHUNK_BYTES_DEVICE = 48 << 20, 256 << 20


@dataclass(frozen=True)
class Extracted:
    """Targets of N positions, flat: those of position n are ``counts[n]`` consecutive entries.

    Attributes:
        counts: (N,) int32.
        ids: int32 token ids; by falling probability for top-k, by rising id for sampled.
        logprobs: float16 nats, rounded to nearest: off by at most 2^-11 of the value (0.004 nats at -8).
        tail_logmass: (N,) float32 log of the probability not listed, -inf when all is.
        draws: uint16 counts of each token, or None.
        mean_logprob: (N,) float32 mean over the draws of their log-probability in nats, or None.
    """

    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    tail_logmass: NDArray[np.float32]
    draws: NDArray[np.uint16] | None
    mean_logprob: NDArray[np.float32] | None = None

    def split(self, positions: Sequence[int]) -> list[Extracted]:
        """Take the targets of N positions apart into those of consecutive examples of so many positions each."""
        ends = np.cumsum(positions)
        entry_ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        parts = []
        for end, count in zip(ends, positions, strict=True):
            at = slice(end - count, end)
            entries = slice(entry_ends[end - count], entry_ends[end])
            parts.append(
                Extracted(
                    self.counts[at],
                    self.ids[entries],
                    self.logprobs[entries],
                    self.tail_logmass[at],
                    None if self.draws is None else self.draws[entries],
                    None if self.mean_logprob is None else self.mean_logprob[at],
                )
            )
        return parts

    @classmethod
    def concatenate(cls, parts: list[Extracted]) -> Extracted:
        """Join parts in order."""
        draws = [part.draws for part in parts if part.draws is not None]
        means = [part.mean_logprob for part in parts if part.mean_logprob is not None]
        return cls(
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.tail_logmass for part in parts]),
            np.concatenate(draws) if draws else None,
            np.concatenate(means) if means else None,
        )


@torch.no_grad()
def extract(
    hidden: Tensor,
    head: OutputHead,
    targets: Targets,
    *,
    temperature: float = 1.0,
    uniforms: NDArray[np.float64] | None = None,
) -> Extracted:
    """Project ``hidden`` chunk by chunk and keep what ``targets`` asks for.

    Args:
        hidden: (N, H) last hidden states at the scored positions, N > 0.
        head: the output head, cut to the tokenizer's vocabulary.
        targets: what to keep.
        temperature: the logits are divided by it before the softmax.
        uniforms: (N, D) random numbers for sampled targets.

    Raises:
        NonFiniteError: the teacher's logits hold NaN or infinity.
    """
    on_cpu = hidden.device.type == "cpu"
    with head.gathered() as whole:
        row_bytes = 4 * whole.weight.shape[0]
        rows = max(1, (_CHUNK_BYTES_CPU if on_cpu else _CHUNK_BYTES_DEVICE) // row_bytes)
        part_rows = max(1, _PART_BYTES_CPU // row_bytes) if on_cpu else rows
        parts = []
        for start in range(0, hidden.shape[0], rows):
            projected = whole.logits(hidden[start : start + rows])
            for first in range(0, len(projected), part_rows):
                logits = projected[first : first + part_rows].float()
                at = slice(start + first, start + first + len(logits))
                numbers = None if uniforms is None else uniforms[at]
                parts.append(from_logits(logits, targets, temperature=temperature, uniforms=numbers))
    return Extracted.concatenate(parts)


def from_logits(
    logits: Tensor, targets: Targets, *, temperature: float = 1.0, uniforms: NDArray[np.float64] | None = None
) -> Extracted:
    """Keep what ``targets`` asks for of a few positions whose logits are there; see :func:`extract`.

    Args:
        logits: (N, V) float32; log-probabilities will do.
        targets: what to keep.
        temperature: the logits are divided by it before the softmax.
        uniforms: (N, D) random numbers for sampled targets.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if isinstance(targets, Sampled):
        assert uniforms is not None
        return _sampled(logits, torch.from_numpy(uniforms).to(logits.device, non_blocking=True))
    return _truncated(logits, targets)


def from_list(ids: NDArray[Any], logprobs: NDArray[Any], tail_logmass: NDArray[Any], targets: TopK | TopP) -> Extracted:
    """Keep what ``targets`` asks for of N positions of which some tokens are listed, by falling probability.

    Args:
        ids: (N, K) token ids.
        logprobs: (N, K) nats; ``-inf`` where a list is shorter.
        tail_logmass: (N,) log of the probability not listed.
        targets: what to keep; a list that is shorter is kept whole.
    """
    there = np.isfinite(logprobs)
    mass = np.where(there, np.exp(logprobs), 0.0)
    if isinstance(targets, TopP):
        listed = there & (mass.cumsum(1) - mass < targets.p)
        listed[:, targets.cap :] = False
    else:
        listed = there.copy()
        listed[:, targets.k :] = False
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(tail_logmass) + np.where(listed, 0.0, mass).sum(1))
    return Extracted(
        listed.sum(1).astype(np.int32),
        ids[listed].astype(np.int32),
        logprobs[listed].astype(np.float16),
        tail.astype(np.float32),
        None,
    )


def _truncated(logits: Tensor, targets: TopK | TopP) -> Extracted:
    values, ids = top_k(logits, min(targets.k if isinstance(targets, TopK) else targets.cap, logits.shape[-1]))
    maximum = values[:, :1]
    exponentials = torch.sub(logits, maximum).exp_()
    total = exponentials.sum(-1, keepdim=True)
    logprobs = values - maximum - total.log()
    rest = _rest(exponentials, ids)
    counts = None
    if isinstance(targets, TopP):
        mass = logprobs.exp()
        # A token is listed while those before it have not reached p.
        listed = mass.cumsum(-1) - mass < targets.p
        rest = rest + (values - maximum).exp().masked_fill(listed, 0.0).sum(-1, keepdim=True)
        counts = listed.sum(-1, keepdim=True).int()
    fields = [ids.int(), logprobs.half(), rest.log() - total.log(), (maximum + total.log()).float()]
    arrays = _to_host(*fields, *([] if counts is None else [counts]))
    _require_finite(arrays[3])
    n, k = arrays[0].shape
    if counts is None:
        return Extracted(np.full(n, k, np.int32), arrays[0].ravel(), arrays[1].ravel(), arrays[2].ravel(), None)
    kept = np.arange(k) < arrays[4]
    return Extracted(arrays[4].ravel(), arrays[0][kept], arrays[1][kept], arrays[2].ravel(), None)


def _sampled(logits: Tensor, uniforms: Tensor) -> Extracted:
    maximum = logits.amax(-1, keepdim=True)
    exponentials = torch.sub(logits, maximum).exp_()
    total = exponentials.sum(-1, keepdim=True)
    tokens = _draw(exponentials, uniforms).sort(-1).values
    # Run lengths of the sorted draws, with no wait for the device: entry r of a row is its r-th distinct token.
    new = torch.ones_like(tokens)
    new[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).long()
    rank = new.cumsum(-1) - 1
    draws = torch.zeros_like(tokens).scatter_add_(1, rank, torch.ones_like(tokens))
    ids = tokens[:, :1].expand_as(tokens).scatter(1, rank, tokens)
    logprobs = logits.gather(1, ids) - maximum - total.log()
    # Counts beyond the last distinct token are 0, so what `logprobs` repeats there does not weigh
    mean = (draws * logprobs).sum(-1) / draws.shape[1]
    tail = _rest(exponentials, ids).log() - total.log()
    arrays = _to_host(
        ids.int(),
        logprobs.half(),
        tail,
        (maximum + total.log()).float(),
        draws.int(),
        (rank[:, -1:] + 1).int(),
        mean.float(),
    )
    _require_finite(arrays[3])
    counts = arrays[5].ravel()
    listed = np.arange(ids.shape[1]) < counts[:, None]
    return Extracted(
        counts, arrays[0][listed], arrays[1][listed], arrays[2].ravel(), arrays[4][listed].astype(np.uint16), arrays[6]
    )


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row of ``logits`` (N, V), falling, and their ids.

    Exact. The k largest lie in the k groups of largest maxima, so that only k groups are searched and one cheap
    pass reads the rest.
    """
    n, size = logits.shape
    groups = size // _GROUP
    if groups <= 2 * k:
        return logits.topk(k)
    grouped = logits[:, : groups * _GROUP].unflatten(1, (groups, _GROUP))
    best = grouped.amax(-1).topk(k, sorted=False).indices
    candidates = grouped.gather(1, best[:, :, None].expand(n, k, _GROUP)).flatten(1)
    within = torch.arange(_GROUP, device=logits.device)
    ids = (best[:, :, None] * _GROUP + within).flatten(1)
    if groups * _GROUP < size:
        rest = torch.arange(groups * _GROUP, size, device=logits.device)
        candidates = torch.cat([candidates, logits[:, groups * _GROUP :]], 1)
        ids = torch.cat([ids, rest.expand(n, -1)], 1)
    values, index = candidates.topk(k)
    return values, ids.gather(1, index)


def _draw(exponentials: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution at ``uniforms`` (N, D): first the group, then the token in it.

    Float64 from the groups' sums on: a float32 cumulative sum over 10^5 tokens would lose the tail.
    """
    size = exponentials.shape[1]
    padded = torch.nn.functional.pad(exponentials, (0, -size % _GROUP))
    grouped = padded.unflatten(1, (-1, _GROUP))
    cumulative = grouped.sum(-1).double().cumsum(-1)
    point = uniforms * cumulative[:, -1:]
    group = torch.searchsorted(cumulative, point, right=True).clamp_(max=grouped.shape[1] - 1)
    upper = cumulative.gather(1, group)
    lower = cumulative.gather(1, (group - 1).clamp_(min=0)).where(group > 0, 0.0)
    # As a share of the group, and strictly below one, so that rounding never picks a token of probability zero.
    share = ((point - lower) / (upper - lower)).clamp_(0.0, 1.0 - 1e-12)
    members = grouped.gather(1, group[:, :, None].expand(-1, -1, _GROUP)).double().cumsum(-1)
    inside = torch.searchsorted(members, (share * members[..., -1])[..., None], right=True).squeeze(-1)
    return group * _GROUP + inside


def _rest(exponentials: Tensor, ids: Tensor) -> Tensor:
    """Sum (N, 1) what is not listed, rather than subtract from one, which cancels; overwrites ``exponentials``."""
    return exponentials.scatter_(1, ids, 0.0).sum(-1, keepdim=True)


def _to_host(*tensors: Tensor) -> list[NDArray[Any]]:
    """Bring tensors (N, ...) to NumPy in one transfer."""
    packed = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors]).cpu().numpy()
    arrays, start = [], 0
    for tensor in tensors:
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        arrays.append(np.frombuffer(packed, dtype, tensor.numel(), start).reshape(tensor.shape))
        start += tensor.nbytes
    return arrays


def _require_finite(log_normalizer: NDArray[Any]) -> None:
    bad = int((~np.isfinite(log_normalizer)).sum())
    if bad:
        raise NonFiniteError(
            f"The teacher's logits are NaN or infinite at {bad} of {log_normalizer.size} positions. Nothing of this "
            "unit was stored. Check the teacher's weights, or score it in bfloat16 or float32 rather than float16."
        )
