"""The shape of a model, without its weights: parameters counted on the real architecture, on the meta device."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.models import language_model_from_config


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor.

    Attributes:
        name: its name in the model.
        numel: number of elements.
        trainable: whether it gets a gradient.
        matrix: whether it has more than one dimension; only these get weight decay, a parameter group of their own.
    """

    name: str
    numel: int
    trainable: bool
    matrix: bool


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model.

    Attributes:
        name: as the user named it.
        parameters: every tensor once, tied ones not repeated.
        layers: number of decoder layers.
        hidden: width.
        intermediate: width of the MLP.
        heads: attention heads.
        kv_heads: key-value heads.
        head_dim: width of an attention head.
        vocab: rows of the output head.
        tied: whether the output head is the embedding.
        model_type: transformers' name of the family.
    """

    name: str
    parameters: tuple[Parameter, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    model_type: str

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def trainable(self) -> int:
        """Number of parameters that get a gradient."""
        return sum(p.numel for p in self.parameters if p.trainable)

    @property
    def head_numel(self) -> int:
        """Number of elements of the output head."""
        return self.vocab * self.hidden

    @property
    def largest_layer(self) -> int:
        """Number of parameters of the largest decoder layer."""
        sizes: dict[str, int] = {}
        for parameter in self.parameters:
            _, marker, rest = parameter.name.partition(".layers.")
            if marker:
                number = rest.split(".")[0]
                sizes[number] = sizes.get(number, 0) + parameter.numel
        return max(sizes.values(), default=0)


def architecture(name: str, *, lora_rank: int = 0, lora_targets: Sequence[str] = ()) -> Architecture:
    """Read a model's shape.

    Args:
        name: a known name (see :func:`known_models`), a ``config.json``, or a directory that holds one.
        lora_rank: adds LoRA matrices of this rank and freezes the rest; 0 trains everything.
        lora_targets: names of the linear layers that get an adapter; empty takes all but the head.

    Raises:
        ConfigError: an unknown name, a file that describes no causal language model, or no such layers.
    """
    if lora_rank < 0:
        raise ConfigError(f"lora_rank is {lora_rank}; expected 0 for a full student, or a positive rank.")
    return _build(name, lora_rank, tuple(lora_targets))


@cache
def _build(name: str, lora_rank: int, lora_targets: tuple[str, ...]) -> Architecture:
    import torch

    config = _read_config(name)
    try:
        with torch.device("meta"):
            model: Any = language_model_from_config(config)
    except ValueError as error:
        raise ConfigError(f"{name} describes no causal language model: {' '.join(str(error).split())[:200]}") from error
    parameters = [Parameter(n, p.numel(), lora_rank == 0, p.dim() > 1) for n, p in model.named_parameters()]
    if lora_rank:
        parameters += _lora(model, name, lora_rank, lora_targets)
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Architecture(
        name=name,
        parameters=tuple(parameters),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=model.get_output_embeddings().weight.shape[0],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        model_type=config.model_type,
    )


def _lora(model: Any, name: str, rank: int, targets: tuple[str, ...]) -> list[Parameter]:
    from torch import nn

    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    chosen = {n: m for n, m in linears.items() if not targets or n.split(".")[-1] in targets}
    if not chosen:
        known = sorted({n.split(".")[-1] for n in linears})
        raise ConfigError(
            f"lora_targets {', '.join(targets)} name no layer of {name}; it has {', '.join(known)}."
            + nearest(targets[0], known)
        )
    found = []
    for n, module in chosen.items():
        found.append(Parameter(f"{n}.lora_A.default.weight", rank * module.in_features, True, True))
        found.append(Parameter(f"{n}.lora_B.default.weight", rank * module.out_features, True, True))
    return found


def known_models() -> dict[str, int]:
    """Return the names known without a network, and the published number of parameters of each."""
    table = _table()
    found = {name: entry["parameters"] for name, entry in table["models"].items()}
    return found | {alias: found[name] for alias, name in table["aliases"].items()}


def hub_id(name: str) -> str | None:
    """Return the hub id of a known model, by its full name or by its last part in any case; None for any other."""
    table = _table()
    ids = [*table["models"], *table["aliases"]]
    return next((one for one in ids if name == one or name.lower() == one.split("/")[-1].lower()), None)


def known_tokenizer(name: str) -> str | None:
    """Return what the tokenizer of a known model is called, or None.

    Equal names stand for the same token ids. Behind a slash stands what a family's members may differ in.
    """
    found, table = hub_id(name), _table()
    if found is None:
        return None
    family = str(table["models"][table["aliases"].get(found, found)]["tokenizer"])
    return f"{family.split('/')[0]}/R1-Distill" if "R1-Distill" in found else family


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("kd_plugin.planner").joinpath("known_models.toml").read_text(encoding="utf-8"))


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    table = _table()
    full = _full_name(name, table)
    if full is not None:
        entry = table["models"][full]
        config = AutoConfig.for_model(entry["model_type"], **entry["config"])
        return config
    path = Path(name)
    if not path.exists():
        known = list(known_models())
        raise ConfigError(
            f"{name} is no known model, and no config.json or directory with one.{nearest(name, known)} "
            "Without a network: download its config.json and name that file. Known: " + ", ".join(known)
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{name} holds no config.json.")
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{name} cannot be read as a model's config: {' '.join(str(error).split())[:200]}") from error


def _full_name(name: str, table: dict[str, Any]) -> str | None:
    """Find a known model by its full name, or by its last part in any case."""
    names = {**{n: n for n in table["models"]}, **table["aliases"]}
    if name in names:
        return names[name]
    short = {n.split("/")[-1].lower(): full for n, full in names.items()}
    return short.get(name.lower())
