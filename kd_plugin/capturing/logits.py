"""Logits of one chunk of positions: the largest few of them, and a low-precision head's without its rounding.

PyTorch's CPU product of bfloat16 or float16 operands is summed in float32 and then rounded, which moves a logit of 20
by up to 0.06 nats; a product in float32 takes two to four times as long. So the fast product only finds the likeliest
tokens, and theirs are computed again from the same operands in float32. What is left of the rounding is in the many
unlikely tokens, where it averages out: with C tokens computed again it moves the normalizer by a standard deviation of
at most b / sqrt(12 C) nats, whatever the distribution, where b is what rounding moves a logit by at most.

Shape suffixes: N positions, V vocabulary, C candidates, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kd_plugin.divergence.projection import exact_logits
from kd_plugin.signals import OutputHead

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
