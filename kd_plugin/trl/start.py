"""What must be known and hold before a TRL trainer loads a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kd_plugin.errors import ConfigError
from kd_plugin.launch.consolidate import require_resumable
from kd_plugin.launch.preflight import require_batches, require_offload, require_student
from kd_plugin.limits import deepspeed_splits, refuse_splits
from kd_plugin.lineage import RunLineage, Source, load_record
from kd_plugin.lineage.start import start_run
from kd_plugin.models import output_rows
from kd_plugin.panel import TeacherPanel
from kd_plugin.vocab import Vocabulary

# Where a run is written and how it reports is no part of what it does
_NOT_IN_THE_HASH = frozenset(
    {
        "output_dir",
        "logging_dir",
        "run_name",
        "hub_token",
        "hub_model_id",
        "push_to_hub",
        "report_to",
        "local_rank",
        "lineage",
        "project",
    }
)


def start_lineage(
    *,
    method: str,
    student: Source,
    args: TrainingArguments,
    declared: Any = None,
    teachers: Sequence[Source] = (),
    outputs: Sequence[Source] = (),
    datasets: Sequence[Source] = (),
) -> RunLineage:
    """Describe the run and pass the license gate.

    Args:
        method: what the lineage calls this training.
        student: the student's initialisation.
        args: the trainer's settings, whose ``lineage`` is what the user declares.
        declared: the declaration where ``args`` has none, such as that of a user's own lineage callback.
        teachers: models that score or write for the student.
        outputs: caches.
        datasets: datasets with a name.

    Raises:
        LicenseRefusedError: the terms of a source forbid training.
    """
    settings = {key: value for key, value in args.to_dict().items() if key not in _NOT_IN_THE_HASH}
    return start_run(
        method=method,
        student=student,
        settings=settings,
        declared=declared if args.lineage is None else args.lineage,  # type: ignore[attr-defined]
        teachers=teachers,
        outputs=outputs,
        datasets=datasets,
    )


def require_launchable(
    args: TrainingArguments, model: str | PreTrainedModel, panel: TeacherPanel | None = None
) -> None:
    """Refuse what DeepSpeed or FSDP cannot do with these settings, before the student's weights are loaded.

    Args:
        args: the trainer's settings.
        model: the student, of which the configuration alone is read.
        panel: teachers, whose placement must be possible.

    Raises:
        ConfigError: ranks would share rows or layers, batch sizes contradict, the DeepSpeed configuration was made for
            another student, an offload or a placement cannot be, or ``resume_from_checkpoint`` holds another number of
            ranks' shards.
    """
    _refuse_splits(args)
    plugin: Any = args.deepspeed_plugin
    if panel is not None and plugin is None and _uses_fsdp(args):
        _require_no_adapters(panel)
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    require_batches(
        config,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        ranks=args.world_size,
    )
    student = student_config(model, args)
    if student is not None:
        require_student(config, student)
    checkpoint = resumed_checkpoint(args.resume_from_checkpoint, str(args.output_dir))
    if checkpoint is not None:
        require_resumable(checkpoint, args.world_size, config)
    require_offload(config)


def resumed_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the directory that ``resume_from_checkpoint`` means, which may be ``True`` or ``"true"`` for the last."""
    if resume_from_checkpoint is True or str(resume_from_checkpoint).lower() == "true":
        return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    return str(resume_from_checkpoint) if resume_from_checkpoint else None


def _refuse_splits(args: TrainingArguments) -> None:
    """Refuse context, sequence and tensor parallelism, set here or in an Accelerate YAML or DeepSpeed file."""
    config: Any = args.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()  # reads what the launcher left in the environment
    if config is not None:
        refuse_splits(vars(config))
    plugin: Any = args.deepspeed_plugin
    if plugin is not None:
        refuse_splits(deepspeed_splits(plugin.hf_ds_config.config))


def _require_no_adapters(panel: TeacherPanel) -> None:
    """Refuse adapter teachers under FSDP, where accelerate puts others in the place of the base's parameters."""
    for name, teacher in panel.teachers.items():
        if teacher.capabilities.shares is not None:
            raise ConfigError(
                f"Teacher {name!r} is {teacher.capabilities.kind}, which shares the tensors of its base; accelerate's "
                "FSDP replaces them by shards. Merge the adapter into a model of its own, or train under DeepSpeed."
            )


def _uses_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def student_config(model: str | PreTrainedModel, args: Any) -> Any:
    """Read the student's configuration; None for a directory that holds an adapter alone."""
    if not isinstance(model, str):
        return model.config
    if Path(model, "adapter_config.json").is_file():
        return None
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)


def load_vocabulary(model: str | PreTrainedModel, processing_class: Any, args: Any) -> Vocabulary:
    """Read the student's vocabulary from its tokenizer, and its head's rows from its configuration."""
    if processing_class is None:
        reference = model if isinstance(model, str) else model.config._name_or_path
        init_kwargs = args.model_init_kwargs or {}
        processing_class = AutoTokenizer.from_pretrained(
            reference,
            revision=init_kwargs.get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    found = output_rows(model) if isinstance(model, PreTrainedModel) else output_rows(student_config(model, args))
    return Vocabulary.from_tokenizer(processing_class).within(found)


def refuse_another_run(output_dir: str, run: RunLineage) -> None:
    """Refuse to start afresh in a directory that holds checkpoints, so that none is overwritten.

    Raises:
        ConfigError: names the run that is there, and the ways out.
    """
    checkpoints = sorted(Path(output_dir).glob("checkpoint-*")) if Path(output_dir).is_dir() else []
    if not checkpoints:
        return
    marker = next((c for c in checkpoints if (c / "lineage.json").is_file()), None)
    whose = "another run"
    if marker is not None:
        whose = f"run {load_record(marker)['run']['id']}"
    raise ConfigError(
        f"{output_dir} already holds {len(checkpoints)} checkpoint(s) of {whose}, such as {checkpoints[-1].name}. "
        "Go on with it by trainer.train(resume_from_checkpoint=True), or choose another output_dir; nothing was "
        "changed."
    )


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """List a trainer's datasets, each with the name that messages call it by."""
    named = [] if train_dataset is None else [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, dict):
        named += [(f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items()]
    elif eval_dataset is not None:
        named.append(("eval_dataset", eval_dataset))
    return named
