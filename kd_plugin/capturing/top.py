"""The largest few of many logits."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64  # tokens a group: the maximum (or sum) of each group narrows a search down


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
