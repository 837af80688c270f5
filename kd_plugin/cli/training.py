"""``kd-plugin offline`` and ``kd-plugin panel``: training from flat YAML of TRL's own fields.

Their help has our fields first, and all of TRL's on request; TRL's parser would print the fields of
``TrainingArguments`` first, several hundred lines of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from kd_plugin.errors import ConfigError, nearest, require_known_keys
from kd_plugin.inputs import load_rows, read_yaml
from kd_plugin.sharding.gathering import close_process_group
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer

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


def parse(command: str, config_class: type, argv: Sequence[str]) -> tuple[ScriptArguments, Any, ModelConfig]:
    """Parse a YAML file and options whose names are the fields of TRL's classes and of ``config_class``.

    Raises:
        ConfigError: an unknown key or option, naming the nearest; a file that is missing or no YAML; no model.
    """
    classes = (ScriptArguments, config_class, ModelConfig)
    known = sorted({field.name for cls in classes for field in dataclasses.fields(cls)})
    arguments = list(argv)
    if "--config" in arguments:
        after = arguments[arguments.index("--config") + 1 :]
        if not after:
            raise ConfigError("--config needs a YAML file; none is named.")
        require_known_keys(read_yaml(after[0]), [*known, "env"], after[0])
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


def train(
    command: str, trainer_class: type, config_class: type, argv: Sequence[str], introduction: Introduction
) -> int:
    """Build the trainer from ``argv``, train, resuming where that says so, and save the student with its lineage."""
    everything = asked_for(argv)
    if everything is not None:
        print(help_text(command, config_class, introduction, everything=everything), end="")
        return 0
    output_dir = _train(trainer_class, *parse(command, config_class, argv))
    print(f"The student and its lineage are in {output_dir}.", file=sys.stderr)
    close_process_group()
    return 0


def _train(trainer_class: type, script: ScriptArguments, training: Any, model: ModelConfig) -> str:
    """Train and save, and return where; the trainer is gone then."""
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=training,
        train_dataset=_rows(script, script.dataset_train_split),
        eval_dataset=_rows(script, script.dataset_test_split) if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true", True) else resume)
    trainer.save_model(training.output_dir)
    return str(training.output_dir)


def _rows(script: ScriptArguments, split: str) -> Any:
    """Load a split of the dataset that ``script`` names; None if it names none, as training on a cache's own rows."""
    if not script.dataset_name:
        return None
    return load_rows(script.dataset_name, split=split, name=script.dataset_config, streaming=script.dataset_streaming)


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


_OFFLINE = Introduction(
    description="""\
Train a student on a teacher cache, which `kd-plugin capture` made: no teacher is in memory. Licenses are checked before
any weights are loaded; the student and its lineage end up in output_dir.""",
    example="""\
example, offline.yaml:
    model_name_or_path: STUDENT
    teacher_cache: CACHE            # or several with weights: {CACHE: 0.7, OTHER: 0.3}
    output_dir: out
    ce_weight: 0.1

  kd-plugin offline --config offline.yaml
  kd-plugin offline --config offline.yaml --learning_rate 2e-5 --packing true
  kd-plugin offline --config offline.yaml --resume_from_checkpoint true
  accelerate launch --config_file zero3.yaml -m kd_plugin offline --config offline.yaml

Without dataset_name it trains on the rows of the cache. Exit codes: 0 trained, 1 refused or failed, 2 wrong usage.""",
    own="offline KD",
)


def offline(argv: Sequence[str]) -> int:
    """Run ``kd-plugin offline ARGV``; without ``dataset_name`` it trains on the rows of the cache."""
    return train("offline", OfflineKDTrainer, OfflineKDConfig, argv, _OFFLINE)


_PANEL = Introduction(
    description="""\
Train a student on-policy: it generates, and the teachers of a panel score every token of its responses. Licenses are
checked before any weights are loaded; the student and its lineage end up in output_dir.""",
    example="""\
example, panel.yaml:
    model_name_or_path: STUDENT
    dataset_name: prompts.jsonl       # rows with prompt, and teacher_id or domain
    output_dir: out
    panel:
      divergence: reverse_kl
      routes: {algebra: math, poetry: general}
      teachers:
        math: {model: TEACHER}
        general: {kind: server, url: "http://localhost:8000", repo: OTHER, estimator: topk_tail}

  kd-plugin panel --config panel.yaml
  kd-plugin panel --config panel.yaml --learning_rate 2e-6 --save_rollouts 4
  kd-plugin panel --config panel.yaml --resume_from_checkpoint true
  accelerate launch --config_file zero3.yaml -m kd_plugin panel --config panel.yaml

Watch it with `kd-plugin trace out -o trace.html`. Exit codes: 0 trained, 1 refused or failed, 2 wrong usage.""",
    own="the panel under DeepSpeed",
)


def panel(argv: Sequence[str]) -> int:
    """Run ``kd-plugin panel ARGV``; teachers are the mapping ``teacher_models`` of the configuration, or ``panel``."""
    return train("panel", TeacherPanelTrainer, TeacherPanelConfig, argv, _PANEL)
