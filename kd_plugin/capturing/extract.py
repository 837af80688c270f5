"""From last hidden states to the stored targets: the hot loop of a capture.

Shape suffixes: N scored positions, V vocabulary, K listed tokens, D draws, G groups of consecutive tokens,
C candidates, H hidden width.
Log-softmax is taken in float32 over the tokenizer's vocabulary, of products that were summed in float32 and not
rounded to the teacher's dtype; logits exist for one chunk of positions at a time, nothing waits for the device within
a chunk, and one transfer a chunk brings the results to the host.

PyTorch's CPU product of bfloat16 or float16 operands is summed in float32 and then rounded, which moves a logit of 20
by up to 0.06 nats; a product in float32 takes two to four times as long. So the fast product only finds the likeliest
tokens, and theirs are computed again from the same operands in float32. What is left of the rounding is in the many
unlikely tokens, where it averages out: with C tokens computed again it moves the normalizer by a standard deviation of
at most b / sqrt(12 C) nats, whatever the distribution, where b is what rounding moves a logit by at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.schema import Extracted
from kd_plugin.cache.targets import Sampled, Targets, TopK, TopP
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


GROUP = 64  # tokens a group: the maximum (or sum) of each group narrows a search down
_FEWEST, _MARGIN = 48, 24  # candidates at least, and beyond the tokens that are wanted
_SAMPLED = 32  # candidates where no token is listed for its rank


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row of ``logits`` (N, V), falling, and their ids.

    Exact. The k largest lie in the k groups of largest maxima, so that only k groups are searched and one cheap
    pass reads the rest.
    """
    n, size = logits.shape
    groups = size // GROUP
    if groups <= 2 * k:
        return logits.topk(k)
    grouped = logits[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    best = grouped.amax(-1).topk(k, sorted=False).indices
    candidates = grouped.gather(1, best[:, :, None].expand(n, k, GROUP)).flatten(1)
    within = torch.arange(GROUP, device=logits.device)
    ids = (best[:, :, None] * GROUP + within).flatten(1)
    if groups * GROUP < size:
        rest = torch.arange(groups * GROUP, size, device=logits.device)
        candidates = torch.cat([candidates, logits[:, groups * GROUP :]], 1)
        ids = torch.cat([ids, rest.expand(n, -1)], 1)
    values, index = candidates.topk(k)
    return values, ids.gather(1, index)


@dataclass(frozen=True)
class Ranked:
    """Logits, and the likeliest tokens.

    Attributes:
        logits: (N, V) float32.
        values: (N, C) the largest of them, falling.
        ids: (N, C) their tokens.
    """

    logits: Tensor
    values: Tensor
    ids: Tensor


def rounds(hidden: Tensor) -> bool:
    """Whether a product with ``hidden`` is rounded before it can be had."""
    return hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float16)


def candidates(wanted: int | None) -> int:
    """Return how many tokens to compute again where the ``wanted`` likeliest are listed, None where drawn ones are."""
    return _SAMPLED if wanted is None else max(_FEWEST, wanted + _MARGIN)


def repaired(product: Tensor, hidden: Tensor, head: OutputHead, wanted: int | None) -> Ranked:
    """Turn a rounded product into logits whose likeliest tokens are those of a float32 product.

    Args:
        product: (N, V) ``hidden @ head.weight.T`` in their dtype, without bias, scale and cap.
        hidden: (N, H).
        head: gathered.
        wanted: how many of the likeliest tokens must be the right ones; None for none in particular.
    """
    count = candidates(wanted)
    if product.shape[1] <= 2 * count:
        logits = exact_logits(head, hidden)
        return Ranked(logits, *top_k(logits, min(count, logits.shape[1])))
    logits = head.shaped(product.float())
    ids = top_k(logits, count)[1]
    values, order = exact_at(ids, hidden, head).sort(-1, descending=True)
    smallest = ids[:, -1:]
    limit = logits.gather(1, smallest) + _most_moved(product.gather(1, smallest).float(), head)
    ids = ids.gather(1, order)
    logits.scatter_(1, ids, values)
    if wanted is not None:
        # A token outside could have been rounded down out of the candidates: then nothing short of all will do
        unsure = (values[:, wanted - 1 : wanted] < limit).flatten().nonzero().flatten()
        if len(unsure):
            whole = exact_logits(head, hidden[unsure])
            logits[unsure] = whole
            values[unsure], ids[unsure] = top_k(whole, count)
    return Ranked(logits, values, ids)


def exact_at(ids: Tensor, hidden: Tensor, head: OutputHead) -> Tensor:
    """Return the logits (N, C) of tokens (N, C), their products summed in float32 and not rounded."""
    out = torch.empty(ids.shape, dtype=torch.float32)
    # One position at a time stays in the processor's cache; a batched product of such shapes takes three times as long
    for tokens, state, values in zip(ids, hidden.float(), out, strict=True):
        torch.mv(head.weight.index_select(0, tokens).to(hidden.dtype).float(), state, out=values)
    return head.shaped(out, ids)


def at(hidden: Tensor, head: OutputHead) -> partial[Tensor]:
    """Return what gives the logits of tokens, as :func:`exact_at`, at the positions of ``hidden``."""
    return partial(exact_at, hidden=hidden, head=head)


def _most_moved(product: Tensor, head: OutputHead) -> Tensor:
    """Return by how much rounding may have moved the logits of ``product``: half a unit in its last place."""
    moved = product.abs() * (torch.finfo(head.weight.dtype).eps / 2) * abs(head.logit_scale)
    # The tokens of which it is asked have logits below these, but a bias may stand for a part of them
    if head.bias is not None:
        moved = moved + head.bias.float().abs().max() * (torch.finfo(head.weight.dtype).eps * abs(head.logit_scale))
    return moved
