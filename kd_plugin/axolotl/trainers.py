"""Axolotl's trainer with our mixins before it, and the settings of a configuration in it."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers import AxolotlTrainer

from kd_plugin.axolotl.settings import AxolotlSettings
from kd_plugin.transformers import OfflineKDMixin, TaskEvaluationMixin, TeacherPanelMixin


def offline_trainer(asked: AxolotlSettings) -> type[AxolotlTrainer]:
    """Return a trainer that fits its student to captured targets."""

    class AxolotlOfflineKDTrainer(OfflineKDMixin, AxolotlTrainer):
        tag_names = [*AxolotlTrainer.tag_names, "kd-plugin", "distillation", "offline-kd"]  # noqa: RUF012

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(
                *args,
                teacher_cache=asked.teacher_cache,
                teacher_text=asked.teacher_text,
                offline_settings=asked.offline_settings(),
                evaluation=asked.evaluation(),
                lineage=asked.lineage,
                **kwargs,
            )
            self.eval_data_collator = self.data_collator  # Axolotl pads both alike, and only one was given its targets

    return AxolotlOfflineKDTrainer


def panel_trainer(asked: AxolotlSettings) -> type[AxolotlTrainer]:
    """Return a trainer whose student generates, and which a panel of teachers scores."""

    class AxolotlTeacherPanelTrainer(TeacherPanelMixin, AxolotlTrainer):
        tag_names = [*AxolotlTrainer.tag_names, "kd-plugin", "distillation", "teacher-panel"]  # noqa: RUF012

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("data_collator", None)  # rows stay rows until they are rendered
            kwargs["eval_data_collator"] = list
            super().__init__(
                *args,
                panel_settings=asked.panel_settings(),
                evaluation=asked.evaluation(),
                lineage=asked.lineage,
                **kwargs,
            )

    return AxolotlTeacherPanelTrainer


def evaluated_trainer(asked: AxolotlSettings) -> type[AxolotlTrainer]:
    """Return a trainer that distils nothing, and whose student answers the user's own questions."""

    class AxolotlEvaluatedTrainer(TaskEvaluationMixin, AxolotlTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, evaluation=asked.evaluation(), **kwargs)

    return AxolotlEvaluatedTrainer
