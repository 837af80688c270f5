"""``kd-plugin offline`` and ``kd-plugin panel``: training from flat YAML of TRL's own fields.

Their help has our fields first, and all of TRL's on request.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from trl import ModelConfig, ScriptArguments, get_peft_config

from kd_plugin.cli.parsing import Parser, add_config, take_config
from kd_plugin.cli.values import value_of
from kd_plugin.errors import ConfigError, UsageError
from kd_plugin.inputs import MIXTURE, load_mixture, load_rows
from kd_plugin.sharding import close_process_group
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer

_STUDENT = ("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules")
_DATA = ("datasets", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
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


@dataclass
class DataArguments(ScriptArguments):
    """TRL's ``ScriptArguments``, and the mixture that TRL has in another class."""

    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": f"Several datasets in the place of dataset_name, {MIXTURE}."},
    )


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


def parser_for(command: str, config_class: type, introduction: Introduction, *, everything: bool = False) -> Parser:
    """Return the parser of a training command.

    Args:
        command: its name.
        config_class: the configuration of its trainer.
        introduction: what its help says before the fields.
        everything: whether the help has every field of TRL and transformers, and not only those that most runs set.
    """
    parser = Parser(
        f"kd-plugin {command}",
        usage=f"kd-plugin {command} --config FILE [--FIELD VALUE ...]",
        description=f"{introduction.description}\n\n{introduction.example}",
    )
    add_config(parser, printed=False)
    parser.add_argument("--help-all", "--help_all", action="store_true", help="show every field")
    ours = _ours(config_class, introduction.own)
    added = {name for names in ours.values() for name in names}
    for title, names in ours.items():
        parser.add_fields(config_class, names, title=title)
    for title, cls, often in (
        ("the student (TRL's ModelConfig)", ModelConfig, _STUDENT),
        ("data (TRL's ScriptArguments, and mixtures)", DataArguments, _DATA),
        ("training (TRL and transformers)", config_class, _TRAINING),
    ):
        names = [f.name for f in dataclasses.fields(cls) if f.name not in added]
        shown = names if everything else [name for name in names if name in often]
        parser.add_fields(cls, shown, title=title)
        parser.add_fields(cls, [name for name in names if name not in shown], hidden=True)
        added |= set(names)
    return parser


def parse(
    command: str, config_class: type, argv: Sequence[str], introduction: Introduction | None = None
) -> tuple[DataArguments, Any, ModelConfig]:
    """Parse a YAML file and options whose names are the fields of TRL's classes and of ``config_class``.

    Raises:
        UsageError: an unknown key or option, naming the nearest; a value of another type, or one that TRL or the
            configuration refuses; a file that is missing or no YAML; no student. Names the file and the line.
    """
    introduction = introduction or Introduction("", "", command)
    words = vars(parser_for(command, config_class, introduction).parse_args(list(argv)))
    words.pop("help_all")
    given, asked = take_config(words)
    if asked:
        raise UsageError("--config needs a YAML file; none is named.", f"kd-plugin {command}")
    classes = (DataArguments, config_class, ModelConfig)
    hints = {name: hint for cls in reversed(classes) for name, hint in get_type_hints(cls).items()}
    fields = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    values = given.values({name: hints[name] for name in set().union(*fields)}, elsewhere=["env"])
    if not values.get("model_name_or_path"):
        raise UsageError("no student is named; set model_name_or_path to a path or a hub id.", f"kd-plugin {command}")
    if given.file is not None and "env" in given.file.nodes:
        env = value_of(given.file.nodes["env"], dict[str, Any], f"{given.file.where('env')}: env")
        os.environ.update({name: str(value) for name, value in env.items()})
    with given.usage():
        _require_deepspeed(values.get("deepspeed"))
        script, training, model = (
            cls(**{name: value for name, value in values.items() if name in own})
            for cls, own in zip(classes, fields, strict=True)
        )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    return script, training, model


def _require_deepspeed(given: Any) -> None:
    """Refuse a configuration of DeepSpeed whose sections are none; accelerate's reader would end with a traceback."""
    for name in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16"):
        section = given.get(name) if isinstance(given, dict) else None
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"deepspeed: {name}: expected a mapping, found {section!r}.")


def train(
    command: str, trainer_class: type, config_class: type, argv: Sequence[str], introduction: Introduction
) -> int:
    """Build the trainer from ``argv``, train, resuming where that says so, and save the student with its lineage."""
    if {"--help-all", "--help_all"} & set(argv):
        print(parser_for(command, config_class, introduction, everything=True).format_help(), end="")
        return 0
    output_dir = _train(trainer_class, *parse(command, config_class, argv, introduction))
    print(f"The student and its lineage are in {output_dir}.", file=sys.stderr)
    close_process_group()
    return 0


def _train(trainer_class: type, script: DataArguments, training: Any, model: ModelConfig) -> str:
    """Train and save, and return where; the trainer is gone then."""
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=training,
        train_dataset=_rows(script, script.dataset_train_split),
        eval_dataset=_held_out(script, training),
        peft_config=get_peft_config(model),
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true", True) else resume)
    trainer.save_model(training.output_dir)
    return str(training.output_dir)


def _held_out(script: DataArguments, training: Any) -> Any:
    """Load the rows that evaluations measure the loss on; with ``eval_tasks`` only where a split is named for it."""
    default = next(f.default for f in dataclasses.fields(DataArguments) if f.name == "dataset_test_split")
    if training.eval_strategy == "no" or (training.eval_tasks and script.dataset_test_split == default):
        return None
    return _rows(script, script.dataset_test_split)


def _rows(script: DataArguments, split: str) -> Any:
    """Load a split of the data that ``script`` names; None if it names none, as training on a cache's own rows.

    Raises:
        ConfigError: a mixture that cannot be, or one beside a dataset.
        DataError: a dataset cannot be read.
    """
    if script.datasets:
        if script.dataset_name:
            raise ConfigError("dataset_name and datasets are both set; choose one of them.")
        trained = split == script.dataset_train_split
        parts = [part if trained else {**part, "split": split} for part in script.datasets]
        return load_mixture(parts, streaming=script.dataset_streaming)
    if not script.dataset_name:
        return None
    return load_rows(script.dataset_name, split=split, name=script.dataset_config, streaming=script.dataset_streaming)


def _ours(config_class: type, own: str) -> dict[str, list[str]]:
    """Return the fields that this project declares, by title; bases are named from the most special to the shared."""
    groups: dict[str, list[str]] = {}
    names = {field.name for field in dataclasses.fields(config_class)}
    for cls in config_class.__mro__:
        if not cls.__module__.startswith("kd_plugin"):
            continue
        title = own if cls is config_class else (cls.__doc__ or "").split(";")[0]
        fields = [name for name in inspect.get_annotations(cls) if name in names]
        names -= set(fields)
        if fields:
            groups[title[0].lower() + title[1:]] = fields
    *special, shared = groups
    return {title: groups[title] for title in [*reversed(special), shared]}


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
  kd-plugin panel --config panel.yaml --rounds 4          # collects and trains in turn, for teachers with signal: text
  accelerate launch --config_file zero3.yaml -m kd_plugin panel --config panel.yaml

Watch it with `kd-plugin trace out -o trace.html`. Exit codes: 0 trained, 1 refused or failed, 2 wrong usage.""",
    own="the panel under DeepSpeed",
)


def panel(argv: Sequence[str]) -> int:
    """Run ``kd-plugin panel ARGV``; teachers are the mapping ``teacher_models`` of the configuration, or ``panel``."""
    from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer  # not with every TRL that trains offline
    from kd_plugin.trl.rounds import train_in_rounds

    if "--rounds" not in argv:
        return train("panel", TeacherPanelTrainer, TeacherPanelConfig, argv, _PANEL)
    at = list(argv).index("--rounds")
    count, rest = argv[at + 1 : at + 2], [*argv[:at], *argv[at + 2 :]]
    if not count or not count[0].isdigit():
        followed = "".join(count) or "nothing"
        raise UsageError(f"--rounds needs a number, and is followed by {followed!r}.", "kd-plugin panel")
    script, training, model = parse("panel", TeacherPanelConfig, rest, _PANEL)
    rows = _rows(script, script.dataset_train_split)
    train_in_rounds(int(count[0]), model.model_name_or_path, training, rows, peft_config=get_peft_config(model))
    print(f"The student and its lineage are in {training.output_dir}.", file=sys.stderr)
    close_process_group()
    return 0
