"""Where a run starts from: what must hold before a model is loaded, and the lineage that a model in memory carries.

The mark is on the model object. It follows a deep copy, and a pickled model takes the record along. What changes the
weights after the run has ended is seen by the parameters' version counters, which in-place operations move, and by the
steps of ``torch.optim``'s optimizers, whose fused forms move no counter. Then the mark says nothing any more of what
the weights are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.record import load_record
from kd_plugin.lineage.run import RunLineage
from kd_plugin.lineage.sources import Source
from kd_plugin.upstream import reference_of

if TYPE_CHECKING:
    from kd_plugin.lineage.run import RunLineage


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
    """Let the run check the names that teachers' servers give, before the first prompt is sent to one.

    Args:
        run: has passed its gate.
        teachers: of the run.
    """
    for teacher in teachers:
        if hasattr(teacher, "gate"):
            teacher.gate(functools.partial(run.admit, teacher.source.name))


_MARK = "_kd_plugin_lineage"


class Carried:
    """The run that trained a model last, or its record.

    Args:
        run: the run; None where only its record is left.
        record: what it recorded, where the run is gone.
        step: optimizer steps that it did on the model.
    """

    def __init__(self, run: RunLineage | None, record: Mapping[str, Any] | None = None, step: int = 0) -> None:
        self.run = run
        self.step = step
        self._record = record
        self._versions: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._stepped = False

    def __deepcopy__(self, memo: Any) -> Carried:
        return Carried(self.run, self._record, self.step)

    def __reduce__(self) -> Any:
        return Carried, (None, self.record() if self.step else None, self.step)

    def record(self) -> dict[str, Any]:
        """Return the record of the model as it is now, as a checkpoint of its run would have it."""
        from kd_plugin.lineage.record import sealed

        if self.run is None:
            return dict(self._record or {})
        return sealed(self.run.summary(step=self.step), "in memory")

    def close(self, model: Any) -> None:
        """Remember the weights as they are at the end of the run."""
        self._versions = {id(p): (weakref.ref(p), _version(p)) for p in model.parameters()}
        _CLOSED.watch(self)

    def open(self) -> None:
        """Let the run change the weights again."""
        self._versions, self._stepped = {}, False
        _CLOSED.forget(self)

    @property
    def is_changed(self) -> bool:
        """Whether something else changed the weights after the run had ended."""
        there = [(p(), version) for p, version in self._versions.values()]
        return self._stepped or any(p is not None and _version(p) > version for p, version in there)

    def note_step(self, optimizer: Any) -> bool:
        """Whether a step of this optimizer changed the weights; that is kept."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                ours = self._versions.get(id(p))
                if ours is not None and ours[0]() is p:
                    self._stepped = True
                    return True
        return False


class _Closed:
    """The models whose run has ended, while any is left; only then are optimizers' steps looked at."""

    def __init__(self) -> None:
        self._marks: weakref.WeakSet[Carried] = weakref.WeakSet()
        self._hook: Any = None

    def watch(self, mark: Carried) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._marks.add(mark)
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._after_step)

    def forget(self, mark: Carried) -> None:
        self._marks.discard(mark)
        if not self._marks and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        for mark in list(self._marks):
            if mark.note_step(optimizer):
                self.forget(mark)


_CLOSED = _Closed()


def carried_by(model: Any) -> Carried | None:
    """Return what a model carries, if a run did at least one step on it."""
    for one in _with_base(model):
        found = one.__dict__.get(_MARK)
        if isinstance(found, Carried) and found.step > 0:
            return found
    return None


def take_over(model: Any, run: RunLineage) -> Carried:
    """Let ``run`` train the model from now on; what another run made of it becomes what this one starts from.

    Raises:
        LicenseRefusedError: what the model was made from may not be trained on under this run's declarations.
    """
    before = next((m for one in _with_base(model) if isinstance(m := one.__dict__.get(_MARK), Carried)), None)
    if before is not None and before.run is run:
        before.open()
        return before
    if before is not None:
        before.open()
    if before is not None and before.step > 0:
        run.adopt(before.record())
    mark = Carried(run)
    for one in _with_base(model):
        one.__dict__[_MARK] = mark
    return mark


def _with_base(model: Any) -> Iterator[Any]:
    yield model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        yield model.get_base_model()


def _version(parameter: Any) -> int:
    try:
        return int(parameter._version)
    except RuntimeError:  # an inference tensor counts no versions
        return 0
