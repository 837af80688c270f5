"""Offline KD from a configuration file."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.lightning.module import StudentModule, StudentSettings
from kd_plugin.lightning.offline import OfflineKD
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.settings import settings, takes, values_of


@settings
class OfflineCallbackSettings(LineageSettings, OfflineSettings):
    """All that :class:`OfflineKD` takes from a configuration file, beside the cache."""


@settings
class OfflineModuleSettings(StudentSettings, OfflineCallbackSettings):
    """All that :class:`OfflineKDModule` takes."""

    def __post_init__(self) -> None:
        OfflineSettings.__post_init__(self)
        StudentSettings.__post_init__(self)


@takes(OfflineModuleSettings)
class OfflineKDModule(StudentModule):
    """A student that is fitted to a teacher cache: :class:`StudentModule` with the callback :class:`OfflineKD`.

    Args:
        model: the student, a path or hub id.
        cache: directory of the teacher cache, or a mapping from directories to weights: an offline panel. None takes
            the data module's.
    """

    def __init__(self, model: str, cache: dict[str, float] | str | None = None, **fields: Any) -> None:
        settings = OfflineModuleSettings(**fields)
        fields = vars(settings)
        super().__init__(model, **values_of(StudentSettings, fields))
        self.save_hyperparameters()
        self._kd: OfflineKD | None = None

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that adds the divergence; Lightning attaches it."""
        hp = self.hparams
        cache = hp["cache"] or getattr(getattr(self.trainer, "datamodule", None), "hparams", {}).get("cache")
        if cache is None:
            raise ConfigError("No teacher cache is given: set model.cache or data.cache.")
        self._kd = OfflineKD(cache, **values_of(OfflineCallbackSettings, hp))
        return [self._kd]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the divergence on held-out rows, and answer the samples."""
        if "input_ids" in batch and self._kd is not None:
            self._kd.measure(self, batch, lambda seen: self.model(**seen))
        super().validation_step(batch, batch_idx, dataloader_idx)
