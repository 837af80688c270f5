"""From any checkpoint that Lightning wrote to an ordinary Hugging Face directory, lineage kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from kd_plugin.errors import ConfigError
from kd_plugin.lineage import RunLineage, Source, load_record
from kd_plugin.lineage.record import lineage_directory
from kd_plugin.models import language_model_from_config


def to_huggingface(checkpoint: str | Path, output: str | Path, *, model: str, dtype: str | None = None) -> Path:
    """Write the student of a Lightning checkpoint as a directory that ``from_pretrained`` loads.

    Takes a single file, a DeepSpeed directory of any stage, and an FSDP2 directory; no process group is needed. The
    record in ``output`` has the checkpoint as its parent, with all who taught it, and the digests of the new weights.

    Args:
        checkpoint: what Lightning wrote. Its pickles are loaded: convert only checkpoints that you trust.
        output: a new directory.
        model: path or hub id that the student started from, for its configuration and tokenizer.
        dtype: of the written weights; None keeps the checkpoint's (float32 from DeepSpeed).

    Returns:
        ``output``.

    Raises:
        ConfigError: the checkpoint holds no such model, or an adapter of it.
        LineageError: its lineage is missing or damaged.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    record = load_record(checkpoint)
    state = _state_of(checkpoint)
    if any(".lora_" in name for name in state):
        raise ConfigError(
            f"{checkpoint} holds an adapter. Load it into your module and call module.model.save_pretrained, which "
            "writes the adapter alone."
        )
    with torch.device("meta"):
        student = language_model_from_config(AutoConfig.from_pretrained(model))
    own = _without_prefix(state, set(student.state_dict()), f"{checkpoint} and {model}")
    if dtype is not None:
        own = {name: value.to(getattr(torch, dtype)) for name, value in own.items()}
    student.load_state_dict(own, assign=True, strict=False)
    student.tie_weights()
    student.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    facts = record["policy"]["facts"]
    run = RunLineage(
        method="conversion",
        student=Source(name="student", ref=str(lineage_directory(checkpoint))),
        config={"use": dict(facts)} if facts else None,
    )
    run.write(output, step=record["checkpoint"]["step"])
    return output


def _state_of(checkpoint: Path) -> dict[str, Tensor]:
    """Return the whole state dict, gathered from shards on the CPU."""
    if checkpoint.is_file():
        return torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    if (checkpoint / "checkpoint").is_dir():
        return _from_deepspeed(checkpoint)
    if (checkpoint / ".metadata").is_file():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as directory:
            whole = Path(directory) / "whole.pt"
            dcp_to_torch_save(checkpoint, whole)
            return torch.load(whole, map_location="cpu", weights_only=False, mmap=True)["state_dict"]
    raise ConfigError(
        f"{checkpoint} is no checkpoint of Lightning: expected a file, or a DeepSpeed or FSDP2 directory."
    )


def _from_deepspeed(checkpoint: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="checkpoint"))


def _without_prefix(state: dict[str, Any], expected: set[str], where: str) -> dict[str, Tensor]:
    """Find the model inside a module by the names of its parameters; tied ones may be missing."""
    first = min(expected)
    for prefix in {name[: -len(one)] for one in (first, *expected) for name in state if name.endswith(one)}:
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own = {name: value for name, value in found.items() if name in expected}
        missing = expected - own.keys()
        if own and all("head" in name or "embed" in name for name in missing):
            return own
    raise ConfigError(f"{where}: the checkpoint holds no model with the parameters that this configuration has.")
