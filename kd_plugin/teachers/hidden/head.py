"""The output head of a checkpoint, read alone: the rest of a large teacher is on a server and never here.

The head is one tensor of many files. ``model.safetensors.index.json`` says which file has it, and that file alone is
opened (or downloaded, of a hub id).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.errors import ConfigError
from kd_plugin.models import language_model_from_config
from kd_plugin.sharding import replicated_models
from kd_plugin.signals import OutputHead

_ONE, _MANY = "model.safetensors", "model.safetensors.index.json"
_LEAST_BYTES = 2  # of a value; what has fewer is quantized and has scales somewhere else


@dataclass(frozen=True)
class Checkpoint:
    """A directory or hub id of a causal language model in safetensors.

    Attributes:
        reference: the directory or hub id.
        revision: branch, tag or commit of a hub id.
    """

    reference: str
    revision: str | None = None

    @cached_property
    def config(self) -> Any:
        """The model's configuration.

        Raises:
            ConfigError: there is none to be had.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.reference, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.reference!r} has no configuration of a model ({error}). A server gives hidden states, and its "
                "output head is read from the checkpoint: name the directory or hub id of the weights with repo."
            ) from error

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Name of each tensor, and the name of the file that has it.

        Raises:
            ConfigError: the checkpoint has no safetensors.
        """
        from safetensors import safe_open

        index = self._file(_MANY)
        if index is not None:
            return dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
        if self._file(_ONE) is None:
            raise ConfigError(
                f"{self.reference!r} has neither {_ONE} nor {_MANY}, from which the output head is read. Convert the "
                "checkpoint: model.save_pretrained(directory) writes safetensors."
            )
        with safe_open(self._file(_ONE), framework="pt") as file:
            return dict.fromkeys(file.keys(), _ONE)

    @property
    def bytes(self) -> int | None:
        """Bytes of all weights; None where the checkpoint does not tell without being downloaded."""
        index = self._file(_MANY)
        if index is not None:
            total = json.loads(Path(index).read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
            return None if total is None else int(total)
        one = self._file(_ONE)
        return None if one is None else Path(one).stat().st_size

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ConfigError: it is quantized.
        """
        from safetensors import safe_open

        with safe_open(self._file(self.files[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < _LEAST_BYTES:
            raise ConfigError(
                f"{name} of {self.reference!r} is stored as {str(tensor.dtype).removeprefix('torch.')}: it is "
                "quantized, and what it stands for depends on scales that are not read here. Name a checkpoint whose "
                "output head is in 16 or 32 bits with repo, such as the one that was quantized."
            )
        return tensor

    def head(self, vocab_size: int) -> OutputHead:
        """Read the output head, on the CPU and in the checkpoint's dtype.

        A tied head is the input embedding. Soft-cap and logit scale are those of the configuration.

        Args:
            vocab_size: number of real tokens; the rows beyond are padding.

        Raises:
            ConfigError: no model that gives next tokens, no such tensor, or one of another width.
        """
        with replicated_models(), torch.device("meta"):
            model = language_model_from_config(self.config)
        shape = OutputHead.from_model(model)
        module, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(one): name for name, one in model.named_modules()}
        is_tied = module.weight is embedding.weight  # type: ignore[union-attr]
        weight = self.read(self._stored(names[id(embedding if is_tied else module)], "weight"))
        if weight.shape[1] != shape.weight.shape[1]:
            raise ConfigError(
                f"The output head in {self.reference!r} has a width of {weight.shape[1]}, and its configuration says "
                f"{shape.weight.shape[1]}. Weights and config.json belong to two models."
            )
        bias = None if shape.bias is None else self.read(self._stored(names[id(module)], "bias"))
        return replace(shape, weight=weight, bias=bias, vocab_size=min(vocab_size, weight.shape[0]))

    def _stored(self, module: str, parameter: str) -> str:
        """Return the name under which the checkpoint has a parameter: families put other prefixes before it."""
        name = f"{module}.{parameter}"
        if name in self.files:
            return name
        tail = f"{module.rpartition('.')[2]}.{parameter}"
        alike = [key for key in self.files if key == tail or key.endswith(f".{tail}")]
        if len(alike) != 1:
            raise ConfigError(
                f"{self.reference!r} has {'no tensor' if not alike else f'{len(alike)} tensors'} named like "
                f"{name!r}{'' if not alike else ': ' + ', '.join(sorted(alike)[:3])}, so its output head is not known. "
                "Load and save it once with transformers, and name that directory with repo."
            )
        return alike[0]

    def _file(self, name: str) -> str | None:
        """Return the path of a file of the checkpoint, None where it has none of this name."""
        if Path(self.reference).is_dir():
            path = Path(self.reference, name)
            return str(path) if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return str(hf_hub_download(self.reference, name, revision=self.revision))
        except EntryNotFoundError:
            return None


class HeldHead(nn.Module):
    """An output head's tensors as a module, which a host can move, replicate or shard; it is never run.

    Args:
        head: whose tensors it holds from now on.
        config: of the model, whose width TRL and DeepSpeed read.
    """

    def __init__(self, head: OutputHead, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(head.weight, requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias, requires_grad=False)
        self._head = replace(head, weight=torch.empty(0), bias=None)

    @property
    def head(self) -> OutputHead:
        """The head over the tensors as they are now, which may be parts."""
        return replace(self._head, weight=self.weight, bias=self.bias)
