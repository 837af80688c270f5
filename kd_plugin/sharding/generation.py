"""The student generates while its weights are sharded by ZeRO-3: whether they fit when gathered, and what is said."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria

logger = logging.getLogger(__name__)
GIB = 1024**3
PROGRESS_SECONDS = 30.0


def whole_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights when all are gathered."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def missing_bytes(model: nn.Module) -> int:
    """Return the bytes that gathering adds to those that this rank holds."""
    held = sum(p.ds_tensor.numel() * p.element_size() for p in model.parameters() if hasattr(p, "ds_tensor"))
    return whole_bytes(model) - held


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``, or None where its backend does not tell."""
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):
        return None
    free = backend.mem_get_info(device)[0]  # type: ignore[union-attr]
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)  # type: ignore[union-attr]
    return int(free + cached)


def slow_notice(model: nn.Module, ranks: int, *, fits: bool) -> str:
    """Say, before it begins, that generation without gathered weights is slow, and what would be faster.

    Args:
        model: the student, in parts.
        ranks: over which it is sharded.
        fits: whether gathered weights would fit; False where that is why they are not.
    """
    size = whole_bytes(model) / GIB
    why = "ds3_gather_for_generation is off"
    if not fits:
        why = f"gathered weights would add {missing_bytes(model) / GIB:.1f} GiB to a rank, which has less free"
    faster = "set ds3_gather_for_generation=True" if fits else "free memory, use more ranks"
    return (
        f"The student generates with its weights sharded over {ranks} ranks, because {why}: each token gathers all "
        f"{size:.1f} GiB of it anew. That is slow, and no hang; progress is said every {PROGRESS_SECONDS:.0f} s. "
        f"Faster: {faster}, let a vLLM server generate (use_vllm=True), or train under ZeRO-2."
    )


class GenerationProgress(StoppingCriteria):
    """Says every half minute how far a generation has come; stops nothing.

    Args:
        limit: tokens that may be generated.
        says: whether this rank speaks.
    """

    def __init__(self, limit: int, *, says: bool) -> None:
        self.limit, self.says = limit, says
        self.start: int | None = None
        self.began = self.last = time.monotonic()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return that no row is done."""
        now = time.monotonic()
        if self.start is None:  # called once a token, for the first time behind the first
            self.start = input_ids.size(1) - 1
        if self.says and now - self.last >= PROGRESS_SECONDS:
            self.last, generated = now, input_ids.size(1) - self.start
            pace = generated / (now - self.began)
            logger.warning(
                "Writing without gathered weights: %d of up to %d tokens a row, %.1f tokens/s a row.",
                generated,
                self.limit,
                pace,
            )
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
