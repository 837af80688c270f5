"""A transformers trainer's run around its steps: what must hold before it, its lineage, and what it resumes."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kd_plugin.launch.checkpoints import require_resumable, resume_shards
from kd_plugin.launch.preflight import require_launchable as require_configured
from kd_plugin.limits import refuse_splits
from kd_plugin.lineage import RunLineage
from kd_plugin.lineage.record import RECORD
from kd_plugin.lineage.start import refuse_another_run, start_run
from kd_plugin.lineage.trainer_callback import lineage_callback
from kd_plugin.models import output_rows
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.checks import require_no_shared_tensors
from kd_plugin.student.head import config_of, load_tokenizer
from kd_plugin.vocab import Vocabulary

# Where a run is written and how it reports is no part of what it does
_NOT_IN_THE_HASH = {
    "output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "push_to_hub", "report_to", "local_rank",
    "lineage", "project",
}  # fmt: skip


def start_lineage(args: TrainingArguments, distillation: Any, declared: Any = None, **described: Any) -> RunLineage:
    """Describe the run and pass the license gate.

    Args:
        args: the trainer's settings, whose ``lineage``, where they have one, is what the user declares.
        distillation: the dataclass of the distillation's settings; ``args`` itself where they are among its fields.
        declared: the declaration where ``args`` has none, such as that of a user's own lineage callback.
        **described: of :func:`~kd_plugin.lineage.start.start_run`.

    Raises:
        LicenseRefusedError: the terms of a source forbid training.
    """
    found = {field.name: getattr(distillation, field.name) for field in fields(distillation)} | args.to_dict()
    settings = {key: value for key, value in found.items() if key not in _NOT_IN_THE_HASH}
    own = getattr(args, "lineage", None)
    return start_run(settings=settings, declared=declared if own is None else own, **described)


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
        require_no_shared_tensors(panel)
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    require_configured(
        config,
        student_config(model, args),
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        ranks=args.world_size,
    )
    checkpoint = resumed_checkpoint(args.resume_from_checkpoint, str(args.output_dir))
    if checkpoint is not None:
        require_resumable(checkpoint, args.world_size, config)


def resumed_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the directory that ``resume_from_checkpoint`` means, which may be ``True`` or ``"true"`` for the last."""
    if resume_from_checkpoint is True or str(resume_from_checkpoint).lower() == "true":
        return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    return str(resume_from_checkpoint) if resume_from_checkpoint else None


def _refuse_splits(args: TrainingArguments) -> None:
    """Refuse context, sequence and tensor parallelism, set here or in an Accelerate YAML."""
    config: Any = args.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()  # reads what the launcher left in the environment
    if config is not None:
        refuse_splits(vars(config))


def _uses_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def student_config(model: str | PreTrainedModel, args: Any) -> Any:
    """Read the student's configuration; None for a directory that holds an adapter alone."""
    if isinstance(model, str) and Path(model, "adapter_config.json").is_file():
        return None
    return config_of(model, **_where(args))


def load_vocabulary(model: str | PreTrainedModel, processing_class: Any, args: Any) -> Vocabulary:
    """Read the student's vocabulary from its tokenizer, and its head's rows from its configuration."""
    if processing_class is None:
        processing_class = load_tokenizer(model, **_where(args))
    found = output_rows(model) if isinstance(model, PreTrainedModel) else output_rows(student_config(model, args))
    return Vocabulary.from_tokenizer(processing_class).within(found)


def _where(args: Any) -> dict[str, Any]:
    """Return how a student that is named is loaded; plain ``TrainingArguments`` do not say."""
    revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
    return {"revision": revision, "trust_remote_code": getattr(args, "trust_remote_code", False)}


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """List a trainer's datasets, each with the name that messages call it by."""
    named = [] if train_dataset is None else [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, dict):
        named += [(f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items()]
    elif eval_dataset is not None:
        named.append(("eval_dataset", eval_dataset))
    return named


class LineageSavingMixin(Trainer):
    """What this package's trainers add to a trainer's life."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        callback = lineage_callback(self.callback_handler.callbacks)
        if callback is not None:
            callback.attach(self)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the parent does.

        Raises:
            ConfigError: ``output_dir`` holds another run's checkpoints, and this call does not resume; or it resumes
                ZeRO shards that another number of ranks wrote.
        """
        callback = lineage_callback(self.callback_handler.callbacks)
        checkpoint = resumed_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint and self.is_deepspeed_enabled:
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            resume_shards(checkpoint, self.args.world_size, settings)
        if not checkpoint:
            if not getattr(self, "_has_trained", False) and callback is not None:
                refuse_another_run(str(self.args.output_dir))
        elif callback is not None and Path(checkpoint, RECORD).is_file():
            callback.resume(checkpoint)
        self._has_trained = True
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
