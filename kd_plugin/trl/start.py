"""What must be known and hold before a TRL trainer loads a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

from kd_plugin.errors import ConfigError
from kd_plugin.lineage import RunLineage, Source, load_record
from kd_plugin.lineage.start import start_run
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


def load_vocabulary(model: str | PreTrainedModel, processing_class: Any, args: Any) -> Vocabulary:
    """Read the student's vocabulary from its tokenizer, without its weights."""
    if processing_class is None:
        reference = model if isinstance(model, str) else model.config._name_or_path
        init_kwargs = args.model_init_kwargs or {}
        processing_class = AutoTokenizer.from_pretrained(
            reference,
            revision=init_kwargs.get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    return Vocabulary.from_tokenizer(processing_class)


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
