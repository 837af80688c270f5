"""What of a run must be known and hold before a model is loaded, whichever host trains it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.carried import carried_by
from kd_plugin.lineage.record import load_record
from kd_plugin.lineage.run import RunLineage
from kd_plugin.lineage.sources import Source
from kd_plugin.upstream import reference_of


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
    return Source(name="student", ref=reference_of(model) or None, record=record)


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


def refuse_another_run(output_dir: str | Path) -> None:
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


def gate_servers(run: RunLineage, teachers: Iterable[Any]) -> None:
    """Let the run judge the names that teachers' servers give, before the first prompt is sent to one.

    Args:
        run: has passed its gate.
        teachers: of the run.
    """
    for teacher in teachers:
        if hasattr(teacher, "gate"):
            teacher.gate(functools.partial(run.admit, teacher.source.name))
