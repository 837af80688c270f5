"""What `kd-plugin offline` and `kd-plugin panel` share: flat YAML of TRL's own fields, and where rows come from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from kd_plugin.cli.training_help import Introduction, asked_for, help_text
from kd_plugin.errors import ConfigError, DataError, nearest
from kd_plugin.lineage.data import with_origin
from kd_plugin.sharding.gathering import close_process_group

_SUFFIXES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def parse(command: str, config_class: type, argv: Sequence[str]) -> tuple[ScriptArguments, Any, ModelConfig]:
    """Parse a YAML file and options whose names are the fields of TRL's classes and of ``config_class``.

    Raises:
        ConfigError: an unknown key or option, naming the nearest; a file that is missing or no YAML; no model.
    """
    classes = (ScriptArguments, config_class, ModelConfig)
    known = sorted({field.name for cls in classes for field in dataclasses.fields(cls)})
    arguments = list(argv)
    if "--config" in arguments:
        _check_file(arguments[arguments.index("--config") + 1 :][:1], known)
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in (*known, "config") and not name.startswith("no_"):
            raise ConfigError(f"unknown option {argument.split('=')[0]!r}.{nearest(name, known)}")
    parser = TrlParser(classes, prog=f"kd-plugin {command}")  # type: ignore[arg-type]
    script, training, model = parser.parse_args_and_config(arguments)
    if not model.model_name_or_path:
        raise ConfigError("no student is named; set model_name_or_path to a path or a hub id.")
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    return script, training, model


def load_rows(script: ScriptArguments, split: str) -> Any:
    """Load a split from JSON, Parquet, a directory written by ``save_to_disk``, or the hub; None if none is named.

    Raises:
        DataError: a local directory that is no dataset.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    name = script.dataset_name
    if not name:
        return None
    path = Path(name)
    if path.suffix in _SUFFIXES and path.is_file():
        return with_origin(load_dataset(_SUFFIXES[path.suffix], data_files=str(path), split="train"), path)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise DataError(f"{name} has no split {split!r}; it has {', '.join(map(repr, loaded))}.")
            loaded = loaded[split]
        return with_origin(loaded, path)
    rows = load_dataset(name, name=script.dataset_config, split=split, streaming=script.dataset_streaming)
    return with_origin(rows, path) if path.exists() else rows


def train(
    command: str, trainer_class: type, config_class: type, argv: Sequence[str], introduction: Introduction
) -> int:
    """Build the trainer from ``argv``, train, resuming where that says so, and save the student with its lineage."""
    everything = asked_for(argv)
    if everything is not None:
        print(help_text(command, config_class, introduction, everything=everything), end="")
        return 0
    script, training, model = parse(command, config_class, argv)
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load_rows(script, script.dataset_train_split),
        eval_dataset=load_rows(script, script.dataset_test_split) if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true", True) else resume)
    trainer.save_model(training.output_dir)
    print(f"The student and its lineage are in {training.output_dir}.", file=sys.stderr)
    close_process_group()
    return 0


def _check_file(path: Sequence[str], known: list[str]) -> None:
    if not path or not Path(path[0]).is_file():
        raise ConfigError(f"--config needs a YAML file; {path[0] if path else 'nothing'} is none.")
    try:
        content = yaml.safe_load(Path(path[0]).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path[0]} is not valid YAML: {' '.join(str(error).split())}") from error
    for key in content:
        if key not in (*known, "env"):
            raise ConfigError(f"{path[0]}: unknown key {key!r}.{nearest(str(key), known)}")
