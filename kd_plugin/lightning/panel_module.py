"""A teacher panel from a configuration file."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from kd_plugin.lightning.module import StudentModule, StudentSettings
from kd_plugin.lightning.panel import TeacherPanelCorrection
from kd_plugin.lightning.step import SAMPLES
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.settings import option, settings, takes, values_of


@settings
class CorrectionSettings(LineageSettings, PanelSettings):
    """All that :class:`TeacherPanelCorrection` takes from a configuration file."""

    ce_weight: float = option(default=0.0, help="Weight of the cross-entropy on the responses.")
    seed: int = option(default=0, help="Seed of the responses.")


@settings
class PanelModuleSettings(StudentSettings, CorrectionSettings):
    """All that :class:`TeacherPanelModule` takes."""

    def __post_init__(self) -> None:
        CorrectionSettings.__post_init__(self)
        StudentSettings.__post_init__(self)


@takes(PanelModuleSettings)
class TeacherPanelModule(StudentModule):
    """A student that a panel scores: :class:`StudentModule` with the callback :class:`TeacherPanelCorrection`.

    Args:
        model: the student, a path or hub id.
        teacher_models: name to path or hub id of each teacher.
    """

    def __init__(self, model: str, teacher_models: dict[str, Any] | str | None = None, **fields: Any) -> None:
        settings = PanelModuleSettings(teacher_models=teacher_models, **fields)
        fields = vars(settings)
        super().__init__(model, **values_of(StudentSettings, fields))
        self.save_hyperparameters()
        # Built now, so that a wrong setting shows before a model or the trainer is
        self._correction = TeacherPanelCorrection(**values_of(CorrectionSettings, fields))

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that has the panel score the responses; Lightning attaches it."""
        return [self._correction]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Let the student generate on held-out prompts and the panel score them; answer the samples."""
        if "prompt" not in batch or SAMPLES in batch:
            super().validation_step(batch, batch_idx, dataloader_idx)
            return
        responses = self._correction.measure(self, batch, lambda seen: self.model(**seen).loss, batch_idx)
        self.log_accuracy("val/rollout_accuracy", responses, batch)
