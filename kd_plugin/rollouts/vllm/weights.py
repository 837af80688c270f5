"""The student's weights on their way to the servers that generate for it: gathered layer by layer, through files.

All ranks gather together; the first writes. At no time is more than one layer of a sharded student whole, on the device
or in host memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_plugin.errors import ConfigError
from kd_plugin.sharding import gathered_tensor, gathering, outermost_layers
from kd_plugin.upstream import as_stored

_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"


class Weights(Protocol):
    """What is sent of a student."""

    def write(self, directory: Path, *, here: bool) -> None:
        """Write it into a new directory; a collective call where the student is sharded.

        Args:
            directory: of this version.
            here: whether this rank writes; the others gather with it.
        """
        ...

    def read(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """Return name and value of each tensor that was written, one at a time.

        Parameters of the student have their names, but for those that a checkpoint stores in other pieces: experts.
        """
        ...


class AllWeights:
    """Every parameter of a student without adapters, as a checkpoint in safetensors, one file a layer.

    Tensors have the names and the pieces that they have in the student's own checkpoint: transformers holds the experts
    of a layer as one tensor and stores them one by one, and a server reads what is stored.

    Args:
        student: a transformers model, sharded or not.
        dtype: that is written; None as it is held.
    """

    def __init__(self, student: Any, dtype: torch.dtype | None = None) -> None:
        self._student, self._dtype = student, dtype

    def layers(self) -> Iterator[dict[str, Tensor]]:
        """Return the tensors by their names in a checkpoint, those of one layer together; whole until the next one.

        Gathers where the student is sharded, so all ranks go through it together.
        """
        for group in layer_by_layer(self._student):
            with gathering([parameter for _, parameter in group]):
                yield as_stored(self._student, {name: gathered_tensor(parameter).detach() for name, parameter in group})

    def described(self) -> dict[str, list[Any]]:
        """Return names, dtypes and whole shapes in the order of :meth:`layers`."""
        pairs: list[tuple[str, Tensor]] = []
        for group in layer_by_layer(self._student):
            empty = {name: torch.empty(_whole_shape(one), dtype=one.dtype, device="meta") for name, one in group}
            pairs += as_stored(self._student, empty).items()
        return {
            "names": [name for name, _ in pairs],
            "dtype_names": [str(self._dtype or tensor.dtype).removeprefix("torch.") for _, tensor in pairs],
            "shapes": [list(tensor.shape) for _, tensor in pairs],
        }

    def on_device(self) -> Iterator[dict[str, Tensor]]:
        """Return :meth:`layers` in the dtype that is sent."""
        for layer in self.layers():
            yield {name: tensor.to(self._dtype or tensor.dtype) for name, tensor in layer.items()}

    def write(self, directory: Path, *, here: bool) -> None:
        """Write the files, then the index that names them."""
        from safetensors.torch import save_file

        if here:
            directory.mkdir(parents=True, exist_ok=True)
        placed: dict[str, str] = {}
        for number, whole in enumerate(self.layers()):
            if here:
                file = f"model-{number:05d}.safetensors"
                kept = {name: _on_host(tensor, self._dtype) for name, tensor in whole.items()}
                save_file(kept, directory / file, metadata={"format": "pt"})
                placed |= dict.fromkeys(kept, file)
        if here:
            self._student.config.save_pretrained(directory)
            # Last: a directory with an index is whole
            (directory / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))

    def read(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """Return each parameter as it was written."""
        for file in sorted(directory.glob("model-*.safetensors")):
            yield from _tensors(file)


class AdapterWeights:
    """The adapter of a PEFT student.

    Args:
        student: a PEFT model with one active adapter.
        dtype: that is written; None as it is held.

    Raises:
        ConfigError: the adapter trains more than LoRA's own matrices, which vLLM does not load.
    """

    def __init__(self, student: Any, dtype: torch.dtype | None = None) -> None:
        self._student, self._dtype = student, dtype
        self._name = student.active_adapters[0]
        config = student.peft_config[self._name]
        if config.peft_type != "LORA" or getattr(config, "use_dora", False) or config.modules_to_save:
            what = "modules_to_save" if config.modules_to_save else "DoRA" if config.peft_type == "LORA" else "no LoRA"
            raise ConfigError(
                f"rollout_engine: sync='adapter' takes LoRA alone, and the student's adapter is or has {what}, which "
                "vLLM does not load. Leave it out, or merge the adapter and train all weights with sync='reload'."
            )

    def write(self, directory: Path, *, here: bool) -> None:
        """Write the two files of a PEFT adapter."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        own = [(name, parameter) for name, parameter in self._student.named_parameters() if f".{self._name}." in name]
        with gathering([parameter for _, parameter in own]):
            whole = {name: _on_host(gathered_tensor(parameter), self._dtype) for name, parameter in own}
        if not here:
            return
        directory.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(
            self._student, state_dict=whole, adapter_name=self._name, save_embedding_layers=False
        )
        self._student.peft_config[self._name].save_pretrained(directory)
        save_file(state, directory / _ADAPTER, metadata={"format": "pt"})

    def read(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """Return each matrix as it was written, under the name of its parameter."""
        for name, tensor in _tensors(directory / _ADAPTER):
            stem, _, last = name.rpartition(".")
            yield f"{stem}.{self._name}.{last}", tensor


def layer_by_layer(model: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Return the parameters of a model with their names, those of one layer together, the rest one by one.

    A parameter that several modules share comes once, under its first name.
    """
    layer_of = {id(p): number for number, layer in enumerate(outermost_layers(model)) for p in layer.parameters()}
    groups: dict[int, list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        number = layer_of.get(id(parameter))
        if number is None:
            yield [(name, parameter)]
        else:
            groups.setdefault(number, []).append((name, parameter))
    yield from groups.values()


def remove(directory: Path) -> None:
    """Delete a version that nobody reads any more."""
    shutil.rmtree(directory, ignore_errors=True)


def _whole_shape(parameter: Any) -> Sequence[int]:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in its place


def _on_host(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # A copy: what was gathered is let go of, and what was not is trained on
    return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            yield name, opened.get_tensor(name)
