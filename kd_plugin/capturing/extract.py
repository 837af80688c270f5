"""From last hidden states to the stored targets: the hot loop of a capture.

Shape suffixes: N scored positions, V vocabulary, K listed tokens, D draws, G groups of consecutive tokens.
Log-softmax is taken in float32 over the tokenizer's vocabulary, of products that were summed in float32 and not
rounded to the teacher's dtype; logits exist for one chunk of positions at a time, nothing waits for the device within
a chunk, and one transfer a chunk brings the results to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.schema import Extracted
from kd_plugin.cache.targets import Sampled, Targets, TopK, TopP
from kd_plugin.capturing.logits import GROUP, Ranked, at, repaired, rounds, top_k
from kd_plugin.divergence.projection import exact_logits
from kd_plugin.errors import NonFiniteError
from kd_plugin.signals import OutputHead

# Float32 logits of a chunk. On a CPU a chunk is projected at once, since that reads the whole head, and then taken
# apart in parts that stay in its cache.
_PART_BYTES_CPU = 8 << 20
_CHUNK_BYTES_CPU, _CHUNK_BYTES_DEVICE = 48 << 20, 256 << 20


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
    whole = head.real_rows()
    row_bytes = 4 * whole.weight.shape[0]
    rows = max(1, (_CHUNK_BYTES_CPU if on_cpu else _CHUNK_BYTES_DEVICE) // row_bytes)
    part_rows = max(1, _PART_BYTES_CPU // row_bytes) if on_cpu else rows
    parts = []
    for start in range(0, hidden.shape[0], rows):
        chunk = hidden[start : start + rows]
        rounded = rounds(chunk)
        projected = chunk @ whole.weight.to(chunk.dtype).t() if rounded else exact_logits(whole, chunk)
        for first in range(0, len(projected), part_rows):
            product = projected[first : first + part_rows]
            here = slice(start + first, start + first + len(product))
            numbers = None if uniforms is None else uniforms[here]
            if rounded:
                ranked = repaired(product, hidden[here], whole, _listed_by_rank(targets, product.shape[1]))
                parts.append(_kept(ranked, targets, temperature, numbers, at(hidden[here], whole)))
            else:
                parts.append(from_logits(product.float(), targets, temperature=temperature, uniforms=numbers))
    return Extracted.concatenate(parts)


def from_logits(
    logits: Tensor, targets: Targets, *, temperature: float = 1.0, uniforms: NDArray[np.float64] | None = None
) -> Extracted:
    """Keep what ``targets`` asks for of a few positions whose logits are there; see :func:`extract`.

    Args:
        logits: (N, V) float32, overwritten; log-probabilities will do.
        targets: what to keep.
        temperature: the logits are divided by it before the softmax.
        uniforms: (N, D) random numbers for sampled targets.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    wanted = _listed_by_rank(targets, logits.shape[1])
    return _kept(Ranked(logits, *top_k(logits, 1 if wanted is None else wanted)), targets, temperature, uniforms)


def _listed_by_rank(targets: Targets, vocab_size: int) -> int | None:
    """Return how many tokens are listed for their rank, at most; None where drawn ones are listed."""
    if isinstance(targets, Sampled):
        return None
    return min(targets.k if isinstance(targets, TopK) else targets.cap, vocab_size)


def _kept(
    ranked: Ranked,
    targets: Targets,
    temperature: float,
    uniforms: NDArray[np.float64] | None,
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> Extracted:
    """Keep what ``targets`` asks for.

    Args:
        ranked: at temperature 1; overwritten.
        targets: what to keep.
        temperature: the logits are divided by it.
        uniforms: (N, D) random numbers for sampled targets.
        logits_of: gives the logits (N, D) of tokens (N, D), where those of ``ranked`` are only good to draw from.
    """
    logits, values, ids = ranked.logits, ranked.values, ranked.ids
    if temperature != 1.0:
        logits, values = logits.div_(temperature), values / temperature
    if isinstance(targets, Sampled):
        assert uniforms is not None
        numbers = torch.from_numpy(uniforms).to(logits.device, non_blocking=True)
        return _sampled(logits, values[:, :1], numbers, temperature, logits_of)
    wanted = _listed_by_rank(targets, logits.shape[1])
    return _truncated(logits, values[:, :wanted], ids[:, :wanted], targets)


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


def _truncated(logits: Tensor, values: Tensor, ids: Tensor, targets: TopK | TopP) -> Extracted:
    maximum = values[:, :1]
    exponentials = logits.sub_(maximum).exp_()
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


def _sampled(
    logits: Tensor,
    maximum: Tensor,
    uniforms: Tensor,
    temperature: float,
    logits_of: Callable[[Tensor], Tensor] | None,
) -> Extracted:
    exponentials = torch.sub(logits, maximum, out=logits if logits_of else None).exp_()
    total = exponentials.sum(-1, keepdim=True)
    tokens = _draw(exponentials, uniforms).sort(-1).values
    # Run lengths of the sorted draws, with no wait for the device: entry r of a row is its r-th distinct token.
    new = torch.ones_like(tokens)
    new[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).long()
    rank = new.cumsum(-1) - 1
    draws = torch.zeros_like(tokens).scatter_add_(1, rank, torch.ones_like(tokens))
    ids = tokens[:, :1].expand_as(tokens).scatter(1, rank, tokens)
    drawn = logits.gather(1, ids) if logits_of is None else logits_of(ids) / temperature
    logprobs = drawn - maximum - total.log()
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


def _draw(exponentials: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution at ``uniforms`` (N, D): first the group, then the token in it.

    Float64 from the groups' sums on: a float32 cumulative sum over 10^5 tokens would lose the tail.
    """
    size = exponentials.shape[1]
    padded = torch.nn.functional.pad(exponentials, (0, -size % GROUP))
    grouped = padded.unflatten(1, (-1, GROUP))
    cumulative = grouped.sum(-1).double().cumsum(-1)
    point = uniforms * cumulative[:, -1:]
    group = torch.searchsorted(cumulative, point, right=True).clamp_(max=grouped.shape[1] - 1)
    upper = cumulative.gather(1, group)
    lower = cumulative.gather(1, (group - 1).clamp_(min=0)).where(group > 0, 0.0)
    # As a share of the group, and strictly below one, so that rounding never picks a token of probability zero.
    share = ((point - lower) / (upper - lower)).clamp_(0.0, 1.0 - 1e-12)
    members = grouped.gather(1, group[:, :, None].expand(-1, -1, GROUP)).double().cumsum(-1)
    inside = torch.searchsorted(members, (share * members[..., -1])[..., None], right=True).squeeze(-1)
    # Where the logits are NaN, anything is found; the caller refuses them, and until then an id must be one
    return (group * GROUP + inside).clamp_(max=size - 1)


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
