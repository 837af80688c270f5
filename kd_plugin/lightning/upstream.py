"""What this host relies on inside Lightning, PEFT and DeepSpeed: private names, and patches of what they do.

No other file of this room does either; ``tests/contract/test_private_names.py`` holds that, and a test each behaviour.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft.tuners.tuners_utils import BaseTuner


def resumed_from(trainer: Trainer) -> str | Path | None:
    """Return the checkpoint that ``fit(ckpt_path=...)`` resumes, from setup on.

    Lightning 2.6 tells it in ``trainer.ckpt_path`` once it loads it, which sharding strategies do after students and
    teachers are there. Until then it is an argument of the trainer's own running method and nowhere else: no hook, no
    attribute and no strategy is told what ``"last"`` and its like resolved to. So the running call is asked.
    """
    if trainer.ckpt_path:
        return trainer.ckpt_path
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is Trainer._run.__code__ and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
        frame = frame.f_back
    return None


def after_the_save(checkpoint_io: Any, act: Callable[[], None]) -> None:
    """Call ``act`` once a checkpoint's weights are there: an asynchronous plugin saves in a thread, one by one."""
    if isinstance(checkpoint_io, AsyncCheckpointIO) and checkpoint_io._executor is not None:
        checkpoint_io._executor.submit(act)
    else:
        act()


def divide_once(trainer: Trainer) -> Callable[[], None]:
    """Have DeepSpeed take the loss as Lightning hands it over, and return what undoes that.

    Lightning 2.6 divides a loss by ``accumulate_grad_batches``, and DeepSpeed 0.19 once more: steps of SGD would be too
    small by that factor, and gradients be clipped too late.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, DeepSpeedPrecision):
        return lambda: None
    plugin.backward = functools.partial(plugin.backward, scale_wrt_gas=False)  # type: ignore[method-assign]
    return lambda: plugin.__dict__.pop("backward", None)


def prepare_for_zero3(trainer: Trainer) -> Any:
    """Let models load, and adapters be added, under ZeRO-3; keep what this returns alive while the trainer lives.

    Without it ``from_pretrained`` in ``configure_model`` fails: transformers initialises weights that DeepSpeed has
    sharded already, and knows nothing of that. PEFT does the same and does not fail: initialising a part is a no-op,
    so a LoRA student would start from noise instead of its base.

    Returns:
        transformers' handle of the configuration, or None where ZeRO-3 is not in use.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    add_adapters_whole()
    return HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **(strategy.config or {})})


def add_adapters_whole() -> None:
    """Have PEFT make its layers whole where ``deepspeed.zero.Init`` is open (PEFT 0.21); the engine cuts them later."""
    inner = BaseTuner.inject_adapter
    if hasattr(inner, "outside_zero_init"):
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    @functools.wraps(inner)
    def inject_adapter(*args: Any, **kwargs: Any) -> Any:
        shutdown_init_context()  # both do nothing outside of deepspeed.zero.Init
        try:
            return inner(*args, **kwargs)
        finally:
            restore_init_context()

    inject_adapter.outside_zero_init = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter = inject_adapter
