"""Teachers sharded over all ranks, by DeepSpeed ZeRO-3 whatever stage the student trains under, or by FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kd_plugin.sharding.gathering import outermost_layers

# What belongs to training, and would make DeepSpeed build an optimizer for a model that has none
_TRAINING_ONLY = ("optimizer", "scheduler", "gradient_clipping", "zero_allow_untested_optimizer")


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
