"""Checkpoints in DeepSpeed's universal format: cut by parameter, not by rank, so that any number of ranks resumes."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path

from kd_plugin.errors import ConfigError
from kd_plugin.launch.consolidate import UNIVERSAL_MARKER, shard_tag
from kd_plugin.lineage import RunLineage, Source, load_record

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


def to_universal(checkpoint: str | Path, output: str | Path, *, workers: int = 1) -> Path:
    """Write a ZeRO checkpoint anew so that a run with another number of ranks, or another stage, resumes it.

    Args:
        checkpoint: ``checkpoint-N`` with a ``global_step*`` directory in it. Its shards are pickles: convert only
            checkpoints that you trust.
        output: a new or empty directory; ``train(resume_from_checkpoint=output)`` takes it up.
        workers: processes that cut and join; each holds one rank's float32 state.

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
