"""What ``kd-plugin offline --help`` and ``kd-plugin panel --help`` say: our fields first, all of TRL's on request.

TRL's parser would print the fields of ``TrainingArguments`` first, several hundred lines of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl import ModelConfig, ScriptArguments

_STUDENT = ("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules")
_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
_TRAINING = (
    "output_dir",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "max_completion_length",
    "temperature",
    "use_vllm",
    "bf16",
    "gradient_checkpointing",
    "deepspeed",
    "logging_steps",
    "save_steps",
    "eval_strategy",
    "report_to",
    "seed",
    "resume_from_checkpoint",
)
_METAVARS = {bool: "true|false", int: "N", float: "X", dict: "YAML"}


@dataclass(frozen=True)
class Introduction:
    """What a command says of itself.

    Attributes:
        description: what it does.
        example: a configuration and how it is used, as typed.
        own: title of the fields that its configuration class declares itself.
    """

    description: str
    example: str
    own: str


def help_text(command: str, config_class: type, introduction: Introduction, *, everything: bool) -> str:
    """Return the help of a training command.

    Args:
        command: its name.
        config_class: the configuration of its trainer.
        introduction: what comes before the fields.
        everything: with every field of TRL and transformers, instead of those that most runs set.
    """
    parser = argparse.ArgumentParser(
        prog=f"kd-plugin {command}",
        usage=f"kd-plugin {command} --config FILE [--FIELD VALUE ...]",
        description=f"{introduction.description}\n\n{introduction.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    groups = _ours(config_class, introduction.own)
    ours = {field.name for fields in groups.values() for field in fields}
    for title, cls, often in (
        ("the student (TRL's ModelConfig)", ModelConfig, _STUDENT),
        ("data (TRL's ScriptArguments)", ScriptArguments, _DATA),
        ("training (TRL and transformers)", config_class, _TRAINING),
    ):
        groups[title] = [f for f in dataclasses.fields(cls) if f.name not in ours and (everything or f.name in often)]
    general = parser.add_argument_group("options")
    general.add_argument(
        "--config", metavar="FILE", help="YAML whose keys are the fields below; options stand above it"
    )
    general.add_argument("-h", "--help", action="store_true", help="show our fields and the most used of TRL's")
    general.add_argument("--help-all", action="store_true", help="show every field")
    for title, fields in groups.items():
        group = parser.add_argument_group(title)
        for field in fields:
            group.add_argument(f"--{field.name}", metavar=_metavar(field), help=_sentence(field))
    return parser.format_help()


def _ours(config_class: type, own: str) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the fields that this project declares, by title; bases are named from the most special to the shared."""
    groups: dict[str, list[dataclasses.Field[Any]]] = {}
    by_name = {field.name: field for field in dataclasses.fields(config_class)}
    for cls in config_class.__mro__:
        if not cls.__module__.startswith("kd_plugin"):
            continue
        title = own if cls is config_class else (cls.__doc__ or "").split(";")[0]
        fields = [by_name.pop(name) for name in inspect.get_annotations(cls) if name in by_name]
        if fields:
            groups[title[0].lower() + title[1:]] = fields
    *special, shared = groups
    return {title: groups[title] for title in [*reversed(special), shared]}


def _metavar(field: dataclasses.Field[Any]) -> str:
    return _METAVARS.get(type(_default(field)), "VALUE")


def _sentence(field: dataclasses.Field[Any]) -> str:
    default = _default(field)
    said = " ".join(str(field.metadata.get("help", "")).split())
    if default not in (None, "", dataclasses.MISSING):
        said += f" (default: {default})"
    return said.replace("%", "%%")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def asked_for(argv: Sequence[str]) -> bool | None:
    """Return whether help is asked for: None if not, True for every field."""
    if "--help-all" in argv or "--help_all" in argv:
        return True
    return False if {"-h", "--help"} & set(argv) else None
