"""What of a run must be known and hold before a model is loaded, whichever host trains it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugin.lineage.carried import carried_by
from kd_plugin.lineage.run import RunLineage
from kd_plugin.lineage.sources import Source


def student_source(model: Any, revision: str | None = None) -> Source:
    """Name the student's initialisation: a path, a hub id, or where a loaded model says that it came from.

    A model that a run of this process trained carries that run's lineage.

    Args:
        model: a path, a hub id, or a loaded transformers model.
        revision: branch, tag or commit, for a hub id.
    """
    if isinstance(model, str | Path):
        return Source(name="student", ref=str(model), revision=revision)
    carried = carried_by(model)
    record = None if carried is None else carried.record()
    return Source(name="student", ref=getattr(model.config, "_name_or_path", None) or None, record=record)


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


def gate_servers(run: RunLineage, teachers: Iterable[Any]) -> None:
    """Let the run judge the names that teachers' servers give, before the first prompt is sent to one.

    Args:
        run: has passed its gate.
        teachers: of the run.
    """
    for teacher in teachers:
        if hasattr(teacher, "gate"):
            teacher.gate(functools.partial(run.admit, teacher.source.name))
