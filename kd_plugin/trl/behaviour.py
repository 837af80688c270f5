"""What vLLM said of the tokens that it drew: TRL drops it, and importance ratios need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kd_plugin.errors import DataError


@contextmanager
def recorded(vllm_generation: Any) -> Iterator[list[list[float]]]:
    """Collect the log-probabilities of the tokens that are generated inside the block, one list a completion.

    TRL 1.16 asks vLLM for them at the sampling temperature, and its ``DistillationTrainer`` discards them.
    """
    found: list[list[float]] = []
    original = vllm_generation.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        found.extend([float("nan") if token[0] is None else token[0] for token in row] for row in answer[2])
        return answer

    vllm_generation.generate = generate
    try:
        yield found
    finally:
        vllm_generation.generate = original


def padded(found: list[list[float]], completion_mask: Tensor, *, cut: bool = False) -> Tensor:
    """Put the lists beside their completions.

    Args:
        found: one list a row.
        completion_mask: (B, C) 1 for tokens, which stand on the left.
        cut: completions may have lost their ends since.

    Returns:
        (B, C) nats; 0 at padding.

    Raises:
        DataError: they are not one a token.
    """
    lengths = completion_mask.sum(dim=1).tolist()
    if cut:
        found = [row[:length] for row, length in zip(found, lengths, strict=True)]
    if [len(row) for row in found] != lengths:
        raise DataError(
            f"vLLM gave log-probabilities for {[len(row) for row in found]} tokens of completions of {lengths}; "
            "estimator='sampled' needs one a token. Generate without tools, or with transformers (use_vllm=False)."
        )
    rows = [torch.nn.functional.pad(torch.tensor(row), (0, completion_mask.shape[1] - len(row))) for row in found]
    return torch.stack(rows).to(completion_mask.device)
