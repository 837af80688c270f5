"""What models cut over many ranks ask of everyone: that all ranks take part in each gathering, in one order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass gathers parameters from other ranks (DeepSpeed ZeRO-3 or FSDP2).

    A model that is loaded under ZeRO-3 is sharded from the start; one that a host wraps is afterwards.
    """
    return any(hasattr(p, "ds_status") or hasattr(p, "full_tensor") for p in model.parameters())


def most_of_any_rank(counts: Sequence[int], device: torch.device) -> list[int]:
    """Return for each entry its largest value over all ranks; one collective, whatever their number.

    Ranks that hold fewer rows than another make up for the passes that they lack, because a rank that stays away
    from a gathering leaves the others waiting for ever.

    Args:
        counts: the same number of entries on each rank.
        device: where collectives of the default process group run.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not counts:
        return list(counts)
    most = torch.tensor(counts, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return most.tolist()


@contextmanager
def whole_heads(teachers: Iterable[Any]) -> Iterator[None]:
    """Keep the heads of the sharded ones among ``teachers`` whole for the duration of the block.

    The loss opens heads in the order of the rows that a rank happens to hold. All ranks must gather in one order,
    so all heads of a sharded panel are gathered first; opening one again then finds it whole. The price is that
    the heads of all sharded teachers, vocabulary times width each, are in memory together during the loss.
    """
    with ExitStack() as stack:
        for teacher in teachers:
            if needs_all_ranks(teacher):
                stack.enter_context(teacher.head.gathered())
        yield


def needs_all_ranks(teacher: Any) -> bool:
    """Whether each pass of ``teacher`` must be joined by every rank."""
    return bool(getattr(teacher, "is_sharded", False))
