"""Private names of transformers, PEFT, datasets, torch and argparse that the core relies on, each with what it does.

No other file of the core uses one; ``tests/contract/test_private_names.py`` holds that, and each behaviour by a test.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.version import Version

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig

# What `generate` and models call the keys and values of tokens that were read; transformers 5.24 has another name
CACHE = "cache" if Version(metadata.version("transformers")) >= Version("5.24") else "past_key_values"


def reference_of(model: Any) -> str:
    """Return the path or hub id that a model or its configuration was loaded from; of a string the string itself.

    transformers 5.23 keeps it in ``config._name_or_path`` alone; empty for a model that was built in memory.
    """
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", model), "_name_or_path", None) or ""


def tied_names(model: Any) -> set[str]:
    """Return the parameters of a transformers model that are another's where its head is tied."""
    return set(model._tied_weights_keys or ())


def built(cls: Any, config: Any, **kwargs: Any) -> Any:
    """Build a model with initial weights: an automatic class by ``from_config``, a model's own by ``_from_config``."""
    return (getattr(cls, "from_config", None) or cls._from_config)(config, **kwargs)


def as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters of a transformers model by the names, and in the pieces, that ``save_pretrained`` stores.

    A model holds the experts of a layer as one tensor, and its checkpoint one by one. Has no underscore, but stands in
    no documentation.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is called through ``torch.compile``, by its own ``compile`` or in a wrapper."""
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def forget_adapters(model: Any) -> None:
    """Have ``save_pretrained`` take a model for one without adapters, after their layers were taken out."""
    model._hf_peft_config_loaded = False


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is one of torch's dropouts, whose probability is ``p``; their base has no public name."""
    from torch.nn.modules.dropout import _DropoutNd

    return isinstance(module, _DropoutNd)


def own_parameters(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    """Return each parameter that a module owns itself with the dictionary in which another can take its place.

    ``setattr`` will not do: torch (2.13) refuses an ordinary tensor in a parameter's place.
    """
    return [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]


def swap_deepspeed_config(config: Any) -> Any:
    """Set what transformers takes for the process's DeepSpeed configuration; return what it was, None for none.

    It cuts every model that it builds while that is one of ZeRO-3.
    """
    from transformers.integrations import deepspeed as integration

    found, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, config
    return found


def default_generation_parameters() -> dict[str, Any]:
    """Return the values that ``generate`` takes where neither a call nor a checkpoint gives one."""
    from transformers import GenerationConfig

    return GenerationConfig._get_default_generation_params()  # type: ignore[no-any-return]


def pad_token(config: GenerationConfig) -> Tensor | None:
    """Return the padding token of a configuration that ``generate`` has prepared, as a tensor."""
    return config._pad_token_tensor  # type: ignore[no-any-return]


def sampling_loop(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own sampling loop, as ``generate`` would."""
    return model._sample(*args, **kwargs)


def decoding(model: Any) -> AbstractContextManager[Any]:
    """Have the model's layers compute as they do token by token, inside the block."""
    return model._optimize_model_for_decode()  # type: ignore[no-any-return]


def next_inputs(model: Any, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of the next token: the mask is longer by one, and the cache holds what was read."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs)  # type: ignore[no-any-return]


def source_of_stream(rows: Any) -> Any:
    """Return what a ``datasets.IterableDataset`` reads from; None for other rows."""
    return getattr(rows, "_ex_iterable", None)


def option_groups(parser: argparse.ArgumentParser) -> list[tuple[str | None, list[argparse.Action]]]:
    """Return the titles of argparse's groups, each with its options."""
    return [(group.title, group._group_actions) for group in parser._action_groups]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers below an argparse parser, by name."""
    return {name: one for action in parser._actions if isinstance(action.choices, dict)
            for name, one in action.choices.items()}  # fmt: skip


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of an argparse parser, and of those below it."""
    own = [name for action in parser._actions for name in action.option_strings]
    return own + [name for one in subcommands(parser).values() for name in option_names(one)]


def any_rows(tensor: Tensor) -> None:
    """Have ``torch.compile`` take the first dimension of a tensor for one that varies, from the first call on.

    Without it torch 2.13 compiles for the size it sees first, and again when it sees another.
    """
    from torch._dynamo import mark_dynamic

    mark_dynamic(tensor, 0)
