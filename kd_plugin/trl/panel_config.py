"""Configuration of the teacher panel; apart, since what it stands on is not in every TRL that trains offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl import DistillationConfig

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.panel.settings import PanelSettings, RolloutSettings, TeacherSettings, WatchSettings
from kd_plugin.settings import mappings, mutable, part_of
from kd_plugin.trl.config import without_bf16


@dataclass
class TeacherPanelConfig(
    mutable(WatchSettings),  # type: ignore[misc]
    mutable(RolloutSettings),  # type: ignore[misc]
    mutable(TeacherSettings),  # type: ignore[misc]
    mutable(EvaluationSettings),  # type: ignore[misc]
    mutable(LineageSettings),  # type: ignore[misc]
    DistillationConfig,
):
    """What TRL's ``DistillationConfig`` holds, and how a panel of teachers is combined.

    Every inherited field keeps its meaning. With one teacher and default settings the losses and gradients are
    those of ``DistillationTrainer``.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        *mappings(WatchSettings, RolloutSettings, TeacherSettings, EvaluationSettings, LineageSettings),
    ]

    def __post_init__(self):
        without_bf16(self)
        super().__post_init__()
        self.settings()
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor smooths one-hot labels; the panel has the teachers' distributions in their "
                "place. Set it to 0."
            )
        if self.shard_teachers and self.deepspeed is None and self.deepspeed_plugin is None:
            raise ConfigError(
                "shard_teachers needs DeepSpeed: set `deepspeed` to a configuration file, or launch with an Accelerate "
                "YAML that names one."
            )
        if self.rollout_engine is not None and self.use_vllm:
            raise ConfigError("use_vllm is TRL's own vLLM generation, and rollout_engine another. Set one of the two.")
        if self.rollouts == "interleaved" and self.use_vllm:
            raise ConfigError(
                "rollouts='interleaved' needs transformers generation: the panel replaces tokens as they are sampled. "
                "Set use_vllm=False, or let the student generate alone (rollouts='student')."
            )

    def settings(self) -> PanelSettings:
        """Return what decides an on-policy step, as it is now, for the rooms that know no host.

        Raises:
            ConfigError: an unknown name, a value out of range, or two that contradict each other.
        """
        return part_of(PanelSettings, self)
