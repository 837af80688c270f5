"""The plugin that Axolotl loads, by its own interface (``axolotl.integrations.base``, 0.19)."""

from __future__ import annotations

import math
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field

from kd_plugin.axolotl.settings import KEY, evaluating, settings_of
from kd_plugin.lineage.trainer_callback import LicenseLineageCallback


class KDArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration."""

    kd_plugin: dict[str, Any] | None = Field(
        default=None, description="What is distilled: see kd_plugin.axolotl.AxolotlSettings."
    )


class KDPlugin(BasePlugin):
    """Offline KD, a panel, or lineage and evaluation alone, as the key ``kd_plugin`` of the configuration says."""

    def register(self, cfg: Any) -> None:
        """Check the settings, before Axolotl loads anything; raises ConfigError."""
        asked = settings_of(cfg)
        if asked.is_panel or (asked.teacher_cache is not None and not cfg.get("datasets")):
            cfg["datasets"] = [{"path": ".", "type": KEY}]  # Axolotl asks for some; `load_datasets` gives the rows

    def get_input_args(self) -> str:
        """Name the keys that Axolotl's configuration takes beside its own."""
        return "kd_plugin.axolotl.KDArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Return the panel's prompts, or the rows of the cache where the configuration names no datasets."""
        if [one.get("type") for one in cfg.get("datasets") or ()] != [KEY]:
            return None
        train, evaluated = settings_of(cfg).rows()
        steps = cfg.get("max_steps") or math.ceil(len(train) * (cfg.get("num_epochs") or 1) / cfg["batch_size"])
        return TrainDatasetMeta(train_dataset=train, eval_dataset=evaluated, total_num_steps=steps)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Return Axolotl's trainer with what the configuration asks for before it."""
        from kd_plugin.axolotl.trainers import evaluated_trainer, offline_trainer, panel_trainer

        asked = settings_of(cfg)
        if asked.is_offline:
            return offline_trainer(asked)
        if asked.is_panel:
            return panel_trainer(asked)
        return None if asked.eval_tasks is None else evaluated_trainer(asked)

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Return when the trainer evaluates, where it has questions of the user's own to ask."""
        return None if settings_of(cfg).eval_tasks is None else evaluating(cfg)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Follow a run that is not distilled; the trainers of the others bring the callback along."""
        asked = settings_of(cfg)
        return [] if asked.is_offline or asked.is_panel else [LicenseLineageCallback(lineage=asked.lineage)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Follow what fires no event, too, of a trainer that is not ours."""
        asked = settings_of(cfg)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LicenseLineageCallback) and not (asked.is_offline or asked.is_panel):
                callback.attach(trainer)
