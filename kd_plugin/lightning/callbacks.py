"""Callbacks for any Lightning trainer, with or without distillation.

``LicenseLineage`` puts the license lineage beside every checkpoint that is written; ``TaskEvaluation`` has the student
answer the user's own questions at every validation.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_plugin.errors import ConfigError, KDError
from kd_plugin.evaluation.in_loop import EvaluationSettings, Learner, Ranks, TasksInLoop, metrics_of, recorded
from kd_plugin.lightning.student import builds_later, inside_units, shards_the_student
from kd_plugin.lightning.upstream import after_the_save, resumed_from
from kd_plugin.lineage import RunLineage
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.lineage.record import RECORD, lineage_directory
from kd_plugin.lineage.start import Carried, start_run, student_source, take_over
from kd_plugin.settings import built, takes
from kd_plugin.student.head import as_trained, find_student, load_tokenizer

logger = logging.getLogger(__name__)
IN_CHECKPOINT = "kd_plugin_lineage"


class LicenseLineage(Callback):
    """Refuses what the licenses forbid, and writes lineage wherever the trainer writes weights.

    ``OfflineKD`` and ``TeacherPanelCorrection`` bring one along. On any other module::

        trainer = Trainer(callbacks=[LicenseLineage({"use": {"commercial": True}})])

    Every way of saving ends in the strategy's ``save_checkpoint``, so that is what is followed: ``ModelCheckpoint``
    with its top-k, last and weights-only files, ``trainer.save_checkpoint``, and the directories of DeepSpeed and
    FSDP2. A directory holds its lineage itself; beside a file ``x.ckpt`` it lies in ``x.ckpt.lineage/``. The marker
    ``lineage.json`` is removed before weights are written and comes back last. A checkpoint that is deleted takes its
    lineage along. The record is also inside the checkpoint, under ``kd_plugin_lineage``.

    Args:
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.
        student: attribute path of the student, where the module holds several models.
        method: what the lineage calls this training.

    Raises:
        LicenseRefusedError: before the first batch, if the terms of the student or of a declared teacher or dataset
            forbid training.
    """

    def __init__(
        self,
        lineage: Mapping[str, Any] | str | Path | None = None,
        *,
        student: str | None = None,
        method: str = "fine_tuning",
    ) -> None:
        self.lineage = lineage
        self.student = student
        self.method = method
        self.run: RunLineage | None = None
        self._carried: Carried | None = None
        self._restore: Callable[[], None] = lambda: None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pass the gate where the student is known already, and follow the strategy's saves."""
        if stage != "fit":
            return
        brought = any(getattr(c, "brings_lineage", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if self.run is None and not brought and not builds_later(pl_module):
            self._start(pl_module)
        self._follow(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the gate, at the latest now: the model is there, and no batch was seen."""
        if self.run is None:
            self._start(pl_module)
        checkpoint = resumed_from(trainer)
        if checkpoint and (lineage_directory(checkpoint) / RECORD).is_file():
            self._run.resume(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the rows that are trained on, and wait until all that the run rests on is proven."""
        self._run.add_datasets(dataset_sources(trainer.train_dataloader))
        self._run.settle()
        self._carried = take_over(find_student(pl_module, self.student), self._run)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Let the student carry how far it is."""
        if self._carried is not None:
            self._carried.step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on the student speaks for itself as it is."""
        if self._carried is not None:
            self._carried.close(find_student(pl_module, self.student))

    def _start(self, module: LightningModule) -> None:
        model = find_student(module, self.student)
        self.run = start_run(
            method=self.method, student=student_source(model), settings=dict(module.hparams), declared=self.lineage
        )

    @property
    def _run(self) -> RunLineage:
        if self.run is None:
            raise KDError("LicenseLineage has no run yet: it begins when the trainer fits.")
        return self.run

    def _follow(self, trainer: Trainer) -> None:
        self._restore()
        strategy = trainer.strategy
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        @functools.wraps(save)
        def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **kwargs: Any) -> None:
            path = Path(strategy.broadcast(filepath))
            if trainer.is_global_zero:
                (lineage_directory(path) / RECORD).unlink(missing_ok=True)
            checkpoint[IN_CHECKPOINT] = self._run.summary(step=trainer.global_step)
            save(checkpoint, path, *args, **kwargs)
            strategy.barrier("kd_plugin.lineage")
            if trainer.is_global_zero:
                after_the_save(strategy.checkpoint_io, functools.partial(self.write, path, trainer.global_step))

        @functools.wraps(remove)
        def remove_checkpoint(filepath: str | Path) -> None:
            path = Path(filepath)
            beside = lineage_directory(path) if path.is_file() and not path.is_symlink() else None
            remove(filepath)
            if trainer.is_global_zero and beside is not None:
                shutil.rmtree(beside, ignore_errors=True)

        strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        strategy.remove_checkpoint = remove_checkpoint  # type: ignore[method-assign]

        def restore() -> None:
            strategy.save_checkpoint, strategy.remove_checkpoint = save, remove  # type: ignore[method-assign]

        self._restore = restore

    def write(self, checkpoint: str | Path, step: int) -> None:
        """Write the lineage of a checkpoint; a failure leaves the weights and no marker, and training goes on."""
        try:
            self._run.write(checkpoint, step=step)
        except (KDError, OSError) as error:
            logger.error("The weights in %s are saved, but their lineage is not: %s", checkpoint, error)


def lineage_of(trainer: Trainer, run: RunLineage, student: str | None) -> LicenseLineage:
    """Bind ``run`` to the trainer's lineage callback; where it has none, add one that is set up already.

    Args:
        trainer: the trainer.
        run: the run.
        student: attribute path of the student, where the module holds several models.
    """
    own = next((c for c in trainer.callbacks if isinstance(c, LicenseLineage)), None)  # type: ignore[attr-defined]
    if own is None:
        own = LicenseLineage()
        trainer.callbacks.append(own)  # type: ignore[attr-defined]
    own.run, own.student = run, own.student or student
    return own


def declared_lineage(trainer: Trainer) -> Mapping[str, Any] | str | Path | None:
    """Return what the trainer's own lineage callback declares."""
    own = next((c for c in trainer.callbacks if isinstance(c, LicenseLineage)), None)  # type: ignore[attr-defined]
    return None if own is None else own.lineage


@takes(EvaluationSettings)
class TaskEvaluation(Callback):
    """Has the student answer your own questions at every validation, and logs ``val/NAME/accuracy`` with its error.

    ``ModelCheckpoint`` and ``EarlyStopping`` can monitor that. It goes on any module that holds a transformers causal
    language model, with or without distillation::

        trainer = Trainer(callbacks=[OfflineKD("cache"), TaskEvaluation("tasks.yaml")])

    What was measured is in the lineage of the checkpoint of that step. Training stays as it is without, bit for bit.

    Args:
        eval_tasks: a file of tasks as ``kd-plugin evaluate`` takes it, or its mapping.
        student: attribute path of the student, where the module holds several models.
        tokenizer: the student's tokenizer; None reads the module's own, or the one that the student's ``config`` names.

    Raises:
        ConfigError: a task is wrong. When training starts: the trainer never validates.
        DataError: questions cannot be read.
    """

    def __init__(self, eval_tasks: Any, *, student: str | None = None, tokenizer: Any = None, **fields: Any) -> None:
        self.tasks = TasksInLoop(built(EvaluationSettings, {"eval_tasks": eval_tasks, **fields}))
        self.student, self.tokenizer = student, tokenizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training in which nothing would ever be asked."""
        if not trainer.enable_validation:
            raise ConfigError(
                "eval_tasks are answered at validation, and this trainer has none: it needs a val_dataloader and a "
                "validation_step. With KDDataModule and a ready module nothing else is needed; elsewhere let "
                "val_dataloader return kd_plugin.lightning.NoRows(), one empty batch for validation_step to pass over."
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask, verify, log, and tell the lineage; a collective call."""
        if trainer.sanity_checking:
            return
        model = find_student(pl_module, self.student)
        student, world = as_trained(pl_module, model), trainer.world_size
        tokenizer = self.tokenizer or getattr(pl_module, "tokenizer", None) or load_tokenizer(model)
        sharded = world > 1 and shards_the_student(trainer)
        learner = Learner(student, tokenizer, pl_module.device, inside_units(pl_module, student), sharded)
        ranks = Ranks(trainer.global_rank, world, _gathered if world > 1 else list)
        step = trainer.global_step
        found = self.tasks.measure(learner, ranks, output_dir=trainer.default_root_dir, step=step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LicenseLineage) and callback.run is not None:
                callback.run.note_evaluation(step, recorded(found))
        values: Any = metrics_of(found, "val/{task}/{value}")
        pl_module.log_dict(values, sync_dist=True)  # the same on every rank


class NoRows:
    """A ``val_dataloader`` of one empty batch, for a validation that has :class:`TaskEvaluation` alone.

    It draws no random number, as a torch ``DataLoader`` does at each epoch.
    """

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {}


def _gathered(mine: list[Any]) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return [one for part in found for one in part]
