"""Which class a checkpoint is loaded with, and what its configuration says of its vocabulary.

A checkpoint of a model that also sees images (Mistral 3, Gemma 3, Qwen-VL ...) is a language model too: its backbone
takes text alone, and its head gives next tokens. ``AutoModelForCausalLM`` knows some of these families and not others,
and for some it means the text part of another checkpoint format; the class that saved the weights always reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_plugin.errors import ConfigError, KDError, nearest
from kd_plugin.upstream import built

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def require_dtype(dtype: Any) -> None:
    """Refuse the name of a dtype that torch does not have.

    Raises:
        ConfigError: names the nearest.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        known = ["auto", "bfloat16", "float16", "float32"]
        raise ConfigError(f"dtype: {name!r} is unknown; expected one of {', '.join(known)}.{nearest(name, known)}")


def language_model_class(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Return the class, automatic or not, that loads a checkpoint with its language head.

    That is the one that the configuration names, as in TRL, if transformers has it and it gives next tokens. Else the
    automatic class that knows this kind of configuration: of causal language models, or of those that see images.

    Args:
        config: of the checkpoint.
        trust_remote_code: whether the repository's own code may stand in for transformers'.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    own_code = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    if not own_code:
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        sees = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        named = next(iter(config.architectures or ()), None)
        known = {*causal.values(), *sees.values()}
        if named is not None and named in known and hasattr(transformers, named):
            return getattr(transformers, named)
        if config.model_type not in causal and config.model_type in sees:
            return AutoModelForImageTextToText
    if "AutoModelForCausalLM" not in own_code and "AutoModelForImageTextToText" in own_code:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_language_model(
    reference: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint with its language head; see :func:`language_model_class`.

    Args:
        reference: a directory or hub id, of a PEFT adapter too.
        revision: branch, tag or commit.
        trust_remote_code: run Python code that the repository ships.
        **kwargs: further arguments of ``from_pretrained``.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    if not Path(reference, "adapter_config.json").is_file():
        config = _config_of(reference, revision, trust_remote_code, kwargs)
        loader = language_model_class(config, trust_remote_code=trust_remote_code)
    if loader.__name__.startswith("Auto"):
        kwargs["trust_remote_code"] = trust_remote_code
    return loader.from_pretrained(reference, revision=revision, **kwargs)  # type: ignore[no-any-return]


def language_model_from_config(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Build a model with initial weights, of the class that :func:`load_language_model` takes.

    Args:
        config: of the checkpoint.
        **kwargs: of the automatic classes' ``from_config``, such as ``dtype``.

    Raises:
        ValueError: the configuration describes no model that gives next tokens.
    """
    return built(language_model_class(config), config, **kwargs)  # type: ignore[no-any-return]


def output_rows(found: Any) -> int | None:
    """Return the rows of a model's output head, or those that a configuration promises; None where it says nothing.

    Args:
        found: a model, sharded or not, or a configuration.
    """
    head = getattr(found, "get_output_embeddings", lambda: None)()
    if head is not None:
        weight = head.weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves an empty tensor in its place
    config = getattr(found, "config", found)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _config_of(reference: str | Path, revision: str | None, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if options.get("config") is not None:
        return options["config"]
    where = {key: options[key] for key in ("subfolder", "gguf_file", "token", "cache_dir") if key in options}
    with naming(reference):
        return AutoConfig.from_pretrained(reference, revision=revision, trust_remote_code=trust_remote_code, **where)


@contextmanager
def naming(reference: str | Path | None) -> Iterator[None]:
    """Let an error of transformers about a model that is not there, or is incomplete, say which one it is about.

    Raises:
        ConfigError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, KDError):
            raise
        seen = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(
            f"{str(reference)!r} cannot be loaded; expected a model's directory or hub id. {seen}"
        ) from error


def as_tokenizer(given: Any) -> Any:
    """Return a tokenizer, loaded where ``given`` names one by its directory or hub id.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(given, str | Path):
        return given
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError) as error:
        raise ConfigError(f"No tokenizer can be loaded from {str(given)!r}: {error}") from error
