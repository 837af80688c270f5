"""What must be known and hold before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

from kd_plugin.errors import ConfigError
from kd_plugin.lineage import RunLineage, Source, load_record
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


def student_source(model: str | PreTrainedModel, model_init_kwargs: Any) -> Source:
    """Name the student's initialisation: a path, a hub id, or where a loaded model says that it came from."""
    if isinstance(model, str):
        return Source(name="student", ref=model, revision=(model_init_kwargs or {}).get("revision"))
    return Source(name="student", ref=getattr(model.config, "_name_or_path", None) or None)


def dataset_sources(*datasets: Any) -> list[Source]:
    """Name the hub datasets among ``datasets``; what was made in memory is for the user to declare."""
    found: dict[str, Source] = {}
    for dataset in datasets:
        downloads = dataset.info.download_checksums if isinstance(dataset, Dataset) else None
        for url in downloads or {}:
            if url.startswith("hf://datasets/"):
                repo, _, revision = "/".join(url.removeprefix("hf://datasets/").split("/")[:2]).partition("@")
                found[repo] = Source(name=repo, kind="dataset", ref=repo, revision=revision or None, signal="text")
    return list(found.values())


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
    run = RunLineage(
        method=method,
        student=student,
        teachers=teachers,
        outputs=outputs,
        datasets=datasets,
        config=declared if args.lineage is None else args.lineage,  # type: ignore[attr-defined]
        config_hash=_config_hash(args),
    )
    run.require_trainable()
    return run


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


def _config_hash(args: TrainingArguments) -> str:
    """Hash the settings that decide what a run does; the same settings elsewhere give the same hash."""
    settings = {key: value for key, value in args.to_dict().items() if key not in _NOT_IN_THE_HASH}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
