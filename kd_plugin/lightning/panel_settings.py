"""Settings of the teacher panel, under the names of ``TeacherPanelConfig``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lightning.writing import Sampling
from kd_plugin.panel.panel_fields import PanelFields
from kd_plugin.panel.rollout_fields import RolloutFields
from kd_plugin.panel.watch_fields import WatchFields


@dataclass
class PanelSettings(WatchFields, RolloutFields, PanelFields):
    """How teachers are combined, how the student writes, and what watches over it.

    Attributes:
        beta: 0 forward KL, 1 reverse KL, else JSD.
        skew_alpha: share of the teacher in skew_kl's mixture.
        teacher_model_name_or_path: the only teacher, as in TRL.
        teacher_model_revision: its branch, tag or commit.
        teacher_model_init_kwargs: arguments of ``from_pretrained`` for teachers.
        trust_remote_code: run Python code that a teacher's repository ships.
        shard_teachers: under DeepSpeed ZeRO-1 and 2 too, cut local teachers over all ranks.
        max_completion_length: tokens that the student writes.
        temperature: of writing and of the divergence.
        top_p: nucleus.
        top_k: 0 for no limit.
        min_p: smallest share of the likeliest token's probability.
        repetition_penalty: 1 for none.
        cache_implementation: of ``generate``'s key-value cache.
        generation_kwargs: further arguments of ``generate``.
        chat_template_kwargs: further arguments of ``apply_chat_template``.
    """

    beta: float = 1.0
    skew_alpha: float = 0.1
    teacher_model_name_or_path: str | None = None
    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False
    shard_teachers: bool = False
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    cache_implementation: str | None = None
    generation_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; expected a positive number.")
        if self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}; expected at least 1.")
        self.check_panel()
        self.check_rollouts()
        self.check_watch()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> PanelSettings:
        """Build the settings from keyword arguments.

        Raises:
            ConfigError: an unknown name, naming the nearest, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"Unknown setting {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
        return cls(**fields)

    def sampling(self) -> Sampling:
        """Return how the student writes."""
        further = {} if self.cache_implementation is None else {"cache_implementation": self.cache_implementation}
        return Sampling(
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            {**further, **(self.generation_kwargs or {})},
            self.rollout_draws,
        )
