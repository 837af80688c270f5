"""Checkpoints of several ranks, or of Lightning: one Hugging Face directory, or DeepSpeed's universal format.

The universal format is sharded by parameter, not by rank, so that any number of ranks resumes. Lineage is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from kd_plugin.errors import ConfigError
from kd_plugin.lineage import RunLineage, Source, load_record
from kd_plugin.lineage.record import lineage_directory
from kd_plugin.models import language_model_from_config
from kd_plugin.upstream import tied_names

UNIVERSAL_MARKER = "latest_universal"
_BESIDE_THE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = frozenset({"lineage.json", "bom.cdx.json", "trainer_state.json", "model.safetensors.index.json"})
# Weights by rank or whole, which the universal form replaces; and what lineage writes anew
_LEFT_BEHIND = (
    ".safetensors",
    ".bin",
    ".safetensors.index.json",
    "latest",
    "zero_to_fp32.py",
    "lineage.json",
    "NOTICE",
)


def consolidate(checkpoint: str | Path, output: str | Path, *, dtype: str = "bfloat16") -> Path:
    """Write the student of a ZeRO checkpoint of transformers' ``Trainer`` so that ``from_pretrained`` loads it.

    The float32 master weights of all ranks are joined on the CPU, cast and saved as safetensors. Configuration and
    tokenizer come from the checkpoint itself; the new record has the checkpoint as its student, with all who taught
    it.

    Args:
        checkpoint: ``checkpoint-N`` with a ``global_step*`` directory in it. Its shards are pickles: consolidate only
            checkpoints that you trust.
        output: a new or empty directory.
        dtype: of the saved weights.

    Returns:
        ``output``.

    Raises:
        ConfigError: there are no ZeRO shards, some are missing, the weights are LoRA's, or ``output`` holds files.
        LineageError: the checkpoint's lineage is missing or damaged.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    tag = shard_tag(checkpoint)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"Unknown dtype {dtype!r}; expected bfloat16, float16 or float32.")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; name a new directory.")
    record = load_record(checkpoint)
    state = _whole_state(checkpoint, tag)
    if any(".lora_" in name for name in state):
        raise ConfigError(
            f"{checkpoint} holds a LoRA adapter, which the trainer saves whole beside the shards: load it with "
            "PeftModel.from_pretrained."
        )
    _save(state, checkpoint, output, getattr(torch, dtype))
    facts = record["policy"]["facts"]
    run = RunLineage(
        method="conversion",
        student=Source(name="student", ref=str(checkpoint)),
        config={"use": dict(facts)} if facts else None,
    )
    run.write(output, step=record["checkpoint"]["step"])
    return output


def shard_tag(checkpoint: Path) -> str:
    """Return the directory of shards that ``latest`` names, once all ranks' shards are known to be there."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        raise ConfigError(
            f"{checkpoint} has no file 'latest', so it is no DeepSpeed checkpoint. Name a checkpoint-N directory of a "
            "run under DeepSpeed."
        )
    tag = latest.read_text(encoding="utf-8").strip()
    shards = sorted((checkpoint / tag).glob("*_optim_states.pt"))
    if not shards:
        raise ConfigError(f"{checkpoint / tag} holds no *_optim_states.pt; the ranks' shards were not copied here.")
    return tag


def _whole_state(checkpoint: Path, tag: str) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=tag))
    except (FileNotFoundError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{checkpoint / tag} cannot be joined: {' '.join(str(error).split())}. Shards of every rank must be there."
        ) from error


def _save(state: dict[str, Tensor], checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig

    with torch.device("meta"):
        student = language_model_from_config(AutoConfig.from_pretrained(checkpoint), dtype=dtype)
    is_tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    state = {name: value.to(dtype) for name, value in state.items()}
    wrong = student.load_state_dict(state, assign=True, strict=False)
    tied = tied_names(student) if is_tied else set()
    missing = [name for name in wrong.missing_keys if name not in tied]
    if missing or wrong.unexpected_keys:
        raise ConfigError(
            f"{checkpoint}: the shards do not hold the model of its config.json; missing {missing[:3]}, unexpected "
            f"{wrong.unexpected_keys[:3]}."
        )
    student.tie_weights()
    student.save_pretrained(output)
    for pattern in _BESIDE_THE_WEIGHTS:
        for path in checkpoint.glob(pattern):
            if path.name not in _NOT_COPIED and not (output / path.name).exists():
                shutil.copyfile(path, output / path.name)


def saved_ranks(checkpoint: str | Path) -> int:
    """Return how many ranks saved a DeepSpeed checkpoint."""
    checkpoint = Path(checkpoint)
    return len(list((checkpoint / shard_tag(checkpoint)).glob("*_optim_states.pt")))


def resume_shards(checkpoint: str | Path, ranks: int, config: dict[str, Any]) -> None:
    """Have DeepSpeed take a checkpoint for what it is, by its configuration; see :func:`require_resumable`.

    Raises:
        ConfigError: says how to convert the checkpoint.
    """
    if require_resumable(checkpoint, ranks, config):
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


def require_resumable(checkpoint: str | Path, ranks: int, config: Mapping[str, Any]) -> bool:
    """Refuse to resume shards that another number of ranks saved; return whether they are in universal format.

    Args:
        checkpoint: the checkpoint.
        ranks: ranks of this run.
        config: the DeepSpeed configuration of this run; at stage 0 nothing is sharded, so there need be no shards.

    Raises:
        ConfigError: says how to convert the checkpoint.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / UNIVERSAL_MARKER).is_file():
        return True
    if not (checkpoint / "latest").is_file():
        return False
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage == 0 and not any(checkpoint.glob("*/*_optim_states.pt")):
        return False
    saved = saved_ranks(checkpoint)
    if saved == ranks:
        return False
    raise ConfigError(
        f"{checkpoint} was saved by {saved} ranks and this run has {ranks}. Launch {saved} ranks; or convert it "
        f"once with `kd-plugin consolidate {checkpoint} --universal` and resume from {checkpoint}-universal, which any "
        "number of ranks can."
    )


def to_universal(checkpoint: str | Path, output: str | Path, *, workers: int = 1) -> Path:
    """Write a ZeRO checkpoint anew so that a run with another number of ranks, or another stage, resumes it.

    Args:
        checkpoint: ``checkpoint-N`` with a ``global_step*`` directory in it. Its shards are pickles: convert only
            checkpoints that you trust.
        output: a new or empty directory; ``train(resume_from_checkpoint=output)`` takes it up.
        workers: processes that shard and join; each holds one rank's float32 state.

    Returns:
        ``output``, with weights, optimizer, scheduler, the trainer's state and a lineage record of the same run,
        chained to the checkpoint's.

    Raises:
        ConfigError: there are no ZeRO shards, some are missing, DeepSpeed cannot convert them, or ``output`` holds
            files.
        LineageError: the checkpoint's lineage is missing or damaged.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    tag = shard_tag(checkpoint)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; name a new directory.")
    record = load_record(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    _convert(checkpoint / tag, output / tag, workers)
    for path in checkpoint.iterdir():
        if path.is_file() and not path.name.endswith(_LEFT_BEHIND):
            shutil.copyfile(path, output / path.name)
    facts = record["policy"]["facts"]
    run = RunLineage(
        method="conversion",
        student=Source(name="student", ref=str(checkpoint)),
        config={"use": dict(facts)} if facts else None,
        resume_from=checkpoint,
    )
    run.write(output, step=record["checkpoint"]["step"])
    (output / UNIVERSAL_MARKER).write_text(tag, encoding="utf-8")  # last: it says that the rest is there
    return output


def _convert(shards: Path, output: Path, workers: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(output),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # stages 1 and 2 of transformers' trainer write no universal_checkpoint_info
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            ds_to_universal.main(settings)
    except (OSError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        shutil.rmtree(output, ignore_errors=True)
        raise ConfigError(
            f"DeepSpeed cannot convert {shards} to its universal format: {' '.join(str(error).split())}. Shards of "
            "every rank must be there; a run without optimizer states cannot be resumed, only consolidated."
        ) from error


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
