"""Running models whose weights are sharded: a student that generates, and teachers that are never trained.

Whether the student's weights fit when gathered is asked before it generates under ZeRO-3. Teachers are sharded by
DeepSpeed ZeRO-3 whatever stage the student trains under, or by FSDP2.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria

from kd_plugin.sharding.gathering import outermost_layers

# What belongs to training, and would make DeepSpeed build an optimizer for a model that has none
_TRAINING_ONLY = ("optimizer", "scheduler", "gradient_clipping", "zero_allow_untested_optimizer")
logger = logging.getLogger(__name__)
GIB = 1024**3
PROGRESS_SECONDS = 30.0


def inference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a student's DeepSpeed configuration into one that cuts a frozen model over all ranks.

    Args:
        config: the student's configuration, of any stage, with its batch sizes filled in.

    Returns:
        Stage 3 with the student's precision and parameter offload; without optimizer or its offload.
    """
    frozen = {key: copy.deepcopy(value) for key, value in config.items() if key not in _TRAINING_ONLY}
    zero = frozen.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    zero["stage"] = 3
    return frozen


def shard_for_inference(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """Wrap a frozen ``model`` in a DeepSpeed engine that keeps one part of it on each rank.

    A model that was loaded under ZeRO-3 is sharded already and is taken as it is; any other is sharded now, after
    each rank has held all of it in host memory.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=inference_config(config))
    engine.eval()
    return engine


def through(wrapper: nn.Module, model: nn.Module) -> Callable[..., Any]:
    """Return what runs a method of ``model`` as a forward pass of its wrapper.

    A wrapper gathers what its own ``forward`` needs and lets go of it at the end, so a method that is called beside it
    would find parts. The result goes into ``InProcessTeacher.attach``.

    Args:
        wrapper: a DeepSpeed engine, for example; ``model`` itself where FSDP2 sharded it, or where nothing wraps it.
        model: inside of it.
    """

    def call(method: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        own = model.__dict__.get("forward")

        def redirected(*args: Any, **kwargs: Any) -> Any:
            restore()  # the method may want the real forward
            return method(*args, **kwargs)

        def restore() -> None:
            if own is None:
                model.__dict__.pop("forward", None)
            else:
                model.forward = own

        model.forward = redirected
        try:
            return wrapper(*inputs, **named)
        finally:
            restore()

    return call


def called(method: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Run a method where nothing must be entered for it; what :func:`through` returns for a model without a wrapper."""
    return method(*inputs, **named)


def shard_with_fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    """Shard ``model`` over all ranks with FSDP2, in place: each layer a unit, the rest another.

    Args:
        model: the same on each rank.
        **options: those of ``fully_shard``, such as ``mesh``, ``mp_policy`` and ``reshard_after_forward``, which is
            to be true of a model that has no backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in outermost_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


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
