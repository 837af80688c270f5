"""The user's own set at every validation of a Lightning trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings, Learner, Ranks, TasksInLoop, metrics_of, recorded
from kd_plugin.lightning.lineage import LicenseLineage
from kd_plugin.lightning.student import inside_units, shards_the_student
from kd_plugin.settings import built, takes
from kd_plugin.student.head import as_trained, find_student, load_tokenizer


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
