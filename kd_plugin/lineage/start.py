"""What of a run must be known and hold before a model is loaded, whichever host trains it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugin.lineage.run import RunLineage
from kd_plugin.lineage.sources import Source


def student_source(model: Any, revision: str | None = None) -> Source:
    """Name the student's initialisation: a path, a hub id, or where a loaded model says that it came from.

    Args:
        model: a path, a hub id, or a loaded transformers model.
        revision: branch, tag or commit, for a hub id.
    """
    if isinstance(model, str | Path):
        return Source(name="student", ref=str(model), revision=revision)
    return Source(name="student", ref=getattr(model.config, "_name_or_path", None) or None)


def dataset_sources(*datasets: Any) -> list[Source]:
    """Name the hub datasets among ``datasets``; what was made in memory is for the user to declare."""
    from datasets import Dataset

    found: dict[str, Source] = {}
    for dataset in datasets:
        downloads = dataset.info.download_checksums if isinstance(dataset, Dataset) else None
        for url in downloads or {}:
            if url.startswith("hf://datasets/"):
                repo, _, revision = "/".join(url.removeprefix("hf://datasets/").split("/")[:2]).partition("@")
                found[repo] = Source(name=repo, kind="dataset", ref=repo, revision=revision or None, signal="text")
    return list(found.values())


def start_run(
    *,
    method: str,
    student: Source,
    settings: Mapping[str, Any],
    declared: Any = None,
    teachers: Sequence[Source] = (),
    outputs: Sequence[Source] = (),
    datasets: Sequence[Source] = (),
) -> RunLineage:
    """Describe the run and pass the license gate.

    Args:
        method: what the lineage calls this training.
        student: the student's initialisation.
        settings: what decides what the run does, for its hash; the same settings elsewhere give the same hash.
        declared: the user's ``lineage`` field.
        teachers: models that score or write for the student.
        outputs: caches.
        datasets: datasets with a name.

    Raises:
        LicenseRefusedError: the terms of a source forbid training.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode()).hexdigest()
    run = RunLineage(
        method=method,
        student=student,
        teachers=teachers,
        outputs=outputs,
        datasets=datasets,
        config=declared,
        config_hash=digest,
    )
    run.require_trainable()
    return run
