"""Configuration of the teacher panel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DistillationConfig

from kd_plugin.errors import ConfigError
from kd_plugin.panel.panel_fields import PanelFields
from kd_plugin.panel.rollout_fields import RolloutFields
from kd_plugin.panel.watch_fields import WatchFields
from kd_plugin.trl.shared_fields import DistillationFields


@dataclass
class TeacherPanelConfig(WatchFields, RolloutFields, PanelFields, DistillationFields, DistillationConfig):
    """What TRL's ``DistillationConfig`` holds, and how a panel of teachers is combined.

    Every inherited field keeps its meaning. With one teacher and default settings the losses and gradients are
    those of ``DistillationTrainer``.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        *RolloutFields.ROLLOUT_DICT_FIELDS,
        *PanelFields.PANEL_DICT_FIELDS,
        "lineage",
    ]

    shard_teachers: bool = field(
        default=False,
        metadata={
            "help": "Under DeepSpeed: cut local teachers over all ranks by ZeRO-3 also where the student trains under "
            "ZeRO-1 or 2. Under ZeRO-3 they are cut in any case."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_panel()
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
        self.check_rollouts()
        if self.rollouts == "interleaved" and self.use_vllm:
            raise ConfigError(
                "rollouts='interleaved' needs transformers generation: the panel replaces tokens as they are written. "
                "Set use_vllm=False, or let the student write alone (rollouts='student')."
            )
        self.check_watch()
