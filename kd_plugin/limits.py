"""What no trainer of this package does: refused at construction, with the reason. docs/support.md has the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, DataError

_IMAGES = ("image", "images", "pixel_values")
# Names of the ways to split one row, or one layer, over ranks
_SPLITS = {
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "tp_size": "tensor parallelism",
    "sequence_parallel_size": "sequence parallelism",
    "autotp_size": "tensor parallelism",
}


def refuse_splits(sizes: Mapping[str, Any]) -> None:
    """Refuse ranks that share a row or a layer: scored positions are counted in whole rows, heads are whole.

    Args:
        sizes: of a parallelism configuration of accelerate or DeepSpeed, by their names there; others are ignored.

    Raises:
        ConfigError: one of them is above 1.
    """
    for key, what in _SPLITS.items():
        size = sizes.get(key)
        if isinstance(size, int) and size > 1:
            raise ConfigError(
                f"{key}={size}: {what} is not supported. The loss counts its scored positions in whole rows and reads "
                "whole output heads, and each rank would hold a part. Shard by ZeRO or FSDP2 instead, which split "
                "parameters and no rows; shorten rows with max_length, or use gradient checkpointing."
            )


def deepspeed_splits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that a DeepSpeed configuration gives, for :func:`refuse_splits`."""
    tensor = config.get("tensor_parallel") or {}
    return {"sequence_parallel_size": config.get("sequence_parallel_size"), "autotp_size": tensor.get("autotp_size")}


def refuse_prompt_learning(model: Any, peft_config: Any = None) -> None:
    """Refuse a student whose adapter adds virtual tokens instead of changing layers.

    Args:
        model: the student, loaded or the directory or hub id that it will be loaded from.
        peft_config: of an adapter that is still to be made; or None.

    Raises:
        ConfigError: it is one of prompt tuning, prefix tuning or p-tuning.
    """
    configs = [] if peft_config is None else [peft_config]
    if isinstance(model, str):
        if Path(model, "adapter_config.json").is_file():
            from peft import PeftConfig

            configs.append(PeftConfig.from_pretrained(model))
    else:
        own = getattr(model, "peft_config", None)
        configs += list(own.values()) if isinstance(own, Mapping) else []
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise ConfigError(
            "Prompt-learning PEFT methods shift every position by their virtual tokens, so that no teacher's targets "
            "would fit, and the loss does not see those tokens. Use a weight-based adapter such as LoRA."
        )


def refuse_images(names: Iterable[str], what: str) -> None:
    """Refuse rows that hold images.

    Args:
        names: of a dataset's columns, or the keys of a batch.
        what: how the message calls them.

    Raises:
        DataError: names the column.
    """
    found = [name for name in names if name in _IMAGES]
    if found:
        raise DataError(
            f"{what} has a column {found[0]!r}: teachers score text, and no cache holds images. Remove the column to "
            "train on the text alone, or use TRL's own trainers."
        )


def refuse_router_loss(config: Any, reason: str) -> None:
    """Refuse a mixture-of-experts student that is asked for a router loss which the loss would not contain.

    Args:
        config: of the student.
        reason: why it would not, and the way out.

    Raises:
        ConfigError: the configuration has ``output_router_logits=True``.
    """
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            f"The student's configuration has output_router_logits=True, which asks for a router loss. {reason} Set it "
            "to False, in model_init_kwargs or the model's config, to train without it."
        )


def refuse_label_smoothing(args: Any) -> None:
    """Refuse labels that are smoothed, where a teacher's distribution stands in their place.

    Args:
        args: transformers' ``TrainingArguments``.

    Raises:
        ConfigError: ``label_smoothing_factor`` is set.
    """
    if args.label_smoothing_factor:
        raise ConfigError(
            "label_smoothing_factor smooths one-hot labels; offline KD has the teacher's distribution in their "
            "place. Set it to 0."
        )
