"""Training on a teacher's text in Lightning: the module's own loss, as one mean over all tokens of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from kd_plugin.lightning.lineage import declared_lineage, lineage_of
from kd_plugin.lightning.step import (
    WINDOW_TOKENS,
    ReplacedStep,
    StudentCallback,
    divisor,
    require_mapping,
    require_whole_windows,
    with_loss,
    without,
)
from kd_plugin.lightning.student import loss_of
from kd_plugin.lineage.start import start_run, student_source
from kd_plugin.student.head import find_student
from kd_plugin.text.dataset import TrainingText


@dataclass(frozen=True)
class _CrossEntropy:
    ce_weight: float = 1.0


class TeacherText(StudentCallback):
    """Passes the license gate of a teacher's text, and makes a module's mean loss one over all tokens of a step.

    A ``training_step`` returns the mean over its own batch's labels. Ranks and micro-batches hold different numbers of
    them, so each mean is weighed by its share of all labels of the accumulation window, as in TRL.

    Args:
        text: what is trained on.
        student: attribute path of the student, where the module holds several models.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.

    Raises:
        ConfigError: at setup, as ``OfflineKD``.
        LicenseRefusedError: at setup, the terms of a teacher forbid training.
    """

    loss_name = "the loss on the teacher's text"

    def __init__(
        self,
        text: TrainingText,
        *,
        student: str | None = None,
        lineage: Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        super().__init__(student)
        self.text, self.lineage = text, lineage
        self.objective = _CrossEntropy()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the student where it was not there before, and weigh the module's loss from now on."""
        model = find_student(pl_module, self.student)
        if not self._checked:
            self._check(trainer, pl_module, model)
        self._refuse(pl_module, model)
        self._step = _WeighedStep(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse windows that a strategy would fill up from the next epoch."""
        require_whole_windows(trainer)

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate; no weights are needed."""
        hparams = dict(module.hparams)
        declared = self.lineage if self.lineage is not None else declared_lineage(trainer)
        run = start_run(
            method="offline_kd",
            student=student_source(model, hparams.get("revision")),
            outputs=[self.text.source],
            settings=hparams,
            declared=declared,
        )
        lineage_of(trainer, run, self.student)
        self._checked = True


class _WeighedStep(ReplacedStep):
    """Weighs the module's own loss until :meth:`remove`."""

    def __call__(self, batch: Any, *rest: Any) -> Any:
        """Return the module's output, its loss weighed by the batch's share of the window's tokens."""
        require_mapping(batch, "labels", "Its loss is a mean over them.")
        tokens = (batch["labels"][..., 1:] != -100).sum()
        total = divisor(self.trainer, self.module, tokens, batch.get(WINDOW_TOKENS))
        output = self._inner(without(batch, WINDOW_TOKENS), *rest)
        return with_loss(output, loss_of(output, self.module) * (tokens / total))
