"""Building a student in ``configure_model`` under ZeRO-3, where DeepSpeed cuts modules as they are made."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft.tuners.tuners_utils import BaseTuner


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

    _add_adapters_whole()
    return HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **(strategy.config or {})})


def _add_adapters_whole() -> None:
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
