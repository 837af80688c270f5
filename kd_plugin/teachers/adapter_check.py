"""Whether an adapter belongs to a base, found out before either's weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import device as torch_device

from kd_plugin.errors import ConfigError
from kd_plugin.models import language_model_from_config
from kd_plugin.sharding import replicated_models

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def read_adapter(adapter: str, revision: str | None, name: str) -> Any:
    """Read an adapter's PEFT configuration.

    Args:
        adapter: directory or hub id.
        revision: branch, tag or commit.
        name: of the teacher, for messages.

    Raises:
        ConfigError: there is no adapter, or it is one of prompts.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Teacher {name!r}: no PEFT adapter is at {adapter!r} ({error}). Give a directory that PEFT's "
            "save_pretrained wrote, or a hub id; a whole model is a LocalTeacher."
        ) from error
    if config.is_prompt_learning:
        raise ConfigError(
            f"Teacher {name!r}: the adapter {adapter!r} is {config.peft_type}, which adds tokens before the prompt "
            "instead of changing layers. Adapter teachers take those that change layers, such as LoRA."
        )
    return config


def require_base(
    config: Any, adapter: str, reference: str | None, base_config: Any, name: str, accept_base: bool
) -> None:
    """Refuse an adapter that was trained on another base.

    Layers and shapes must fit, for an adapter on disk. The base that the adapter names must be this one: two models
    of one architecture take each other's adapters without an error, and then teach nonsense.

    Args:
        config: the adapter's PEFT configuration.
        adapter: directory or hub id of the adapter.
        reference: path or hub id of the base; None for a model in memory that names none.
        base_config: the base's transformers configuration.
        name: of the teacher, for messages.
        accept_base: take another name than the adapter's.

    Raises:
        ConfigError: says what the adapter was trained on, and what the base is.
    """
    named = config.base_model_name_or_path
    _require_shapes(adapter, reference, base_config, name)
    if accept_base or not named or not reference or _same(named, reference):
        return
    raise ConfigError(
        f"Teacher {name!r}: the adapter {adapter!r} was trained on {named!r}, and the base is {reference!r}. Give it "
        "its own base, or, if the two are the same weights under two names, pass accept_base=True."
    )


def _same(named: str, reference: str) -> bool:
    """Whether two names are of one model: equal, one directory, or a hub id and a directory of its name."""
    if named == reference:
        return True
    paths = Path(named), Path(reference)
    if all(path.is_dir() for path in paths):
        return paths[0].resolve() == paths[1].resolve()
    return paths[0].name == paths[1].name and any(path.is_dir() for path in paths)


def _require_shapes(adapter: str, reference: str | None, base_config: Any, name: str) -> None:
    weights = Path(adapter) / _WEIGHTS
    if not weights.is_file():
        return  # on the hub: PEFT compares shapes when it loads
    from safetensors import safe_open

    with replicated_models(), torch_device("meta"):
        modules = dict(language_model_from_config(base_config).named_modules())
    base = repr(reference) if reference else f"a {base_config.model_type} model"
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            path, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
            if kind not in ("lora_A", "lora_B"):
                continue
            if path not in modules:
                raise ConfigError(
                    f"Teacher {name!r}: the adapter {adapter!r} changes {path!r}, which the base {base} does not have. "
                    "It was trained on another base."
                )
            layer, shape = modules[path], tuple(file.get_slice(key).get_shape())
            axis, expected = (1, "in_features") if kind == "lora_A" else (0, "out_features")
            size = getattr(layer, expected, None)
            if size is not None and shape[axis] != size:
                raise ConfigError(
                    f"Teacher {name!r}: the adapter {adapter!r} has {kind} of shape {shape} for {path!r}, whose "
                    f"{expected} in the base {base} are {size}. It was trained on another base."
                )
