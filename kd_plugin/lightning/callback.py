"""What the callbacks that teach a module's student have in common: when they check, join in, and leave."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from kd_plugin.divergence import require_finite
from kd_plugin.lightning.step import DistillingStep
from kd_plugin.lightning.student import (
    builds_later,
    require_launchable,
    require_resumable_ranks,
    require_returned_loss,
    require_supported,
)
from kd_plugin.lightning.upstream import prepare_for_zero3
from kd_plugin.limits import refuse_prompt_learning, refuse_router_loss
from kd_plugin.student.finding import as_trained, config_of, find_student
from kd_plugin.student.forward import DistillingForward


class StudentCallback(Callback):
    """Checks before anything is loaded, and leaves the module as it was; a subclass joins its forward pass and step.

    Attributes:
        brings_lineage: these callbacks start the run's lineage themselves.
        loss_name: how an error calls the loss.
        objective: what is minimised; its ``ce_weight`` is that of the module's own loss.
        student: attribute path of the student, where the module holds several models.
    """

    brings_lineage = True
    loss_name: str
    objective: Any

    def __init__(self, student: str | None) -> None:
        self.student = student
        self._forward: DistillingForward | None = None
        self._step: DistillingStep | None = None
        self._zero3: Any = None  # transformers asks whether this object is alive
        self._checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, the module, the vocabularies and the licenses, before teachers are loaded."""
        self._zero3 = prepare_for_zero3(trainer)
        self._checked = False
        if stage != "fit":
            return
        require_supported(trainer)
        require_resumable_ranks(trainer)
        require_returned_loss(pl_module)
        if not builds_later(pl_module):
            student: PreTrainedModel | str = find_student(pl_module, self.student)
            self._refuse(pl_module, student)
        elif hasattr(pl_module, "student_reference"):
            student = pl_module.student_reference
        else:
            return
        require_launchable(trainer, student)
        self._check(trainer, pl_module, student)

    def _refuse(self, module: LightningModule, student: PreTrainedModel | str) -> None:
        """Refuse a student that this callback's loss would train otherwise than its module means."""
        refuse_prompt_learning(student if isinstance(student, str) else as_trained(module, student))
        if self.objective.ce_weight == 0.0:
            refuse_router_loss(
                config_of(student), "The module's own loss has it, and ce_weight=0 leaves that out: set ce_weight."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss where it is read anyway; reading it at each step would make the device wait."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            require_finite(outputs["loss"], self.loss_name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._step is not None:
            self._step.remove()
        if self._forward is not None:
            self._forward.remove()
        self._step = self._forward = self._zero3 = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.teardown(trainer, pl_module, "fit")

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate and compare vocabularies; neither needs any weights."""
        raise NotImplementedError
