"""Settings of the teacher panel, under the names of ``TeacherPanelConfig``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lightning.writing import Sampling
from kd_plugin.panel import Combine
from kd_plugin.panel.schedule import Schedule


@dataclass(frozen=True)
class PanelSettings:
    """How teachers are combined, and how the student writes.

    Attributes:
        teacher_models: name to path or hub id.
        panel: the whole panel in one block, or a path to YAML with it, in the place of the fields about teachers.
        combine: ``route``, ``weighted_kl``, ``mixture`` or ``confidence``.
        teacher_weights: name to weight, or to a schedule of it.
        domain_weights: domain to such a mapping.
        confidence_temperature: nats, for ``confidence``.
        routes: domain to teacher.
        estimator: ``exact``, ``sampled`` or ``topk_tail``.
        top_k_tail: tokens that ``topk_tail`` lists of a teacher in this process.
        student_top_k: tokens of the student that ``topk_tail`` lists beside.
        ratio_bounds: for ``sampled``: bounds of the importance ratio.
        divergence: a name; None lets ``beta`` decide, as in TRL.
        beta: 0 forward KL, 1 reverse KL, else JSD.
        skew_alpha: share of the teacher in skew_kl's mixture.
        teacher_model_name_or_path: the only teacher, as in TRL.
        teacher_model_revision: its branch, tag or commit.
        teacher_model_init_kwargs: arguments of ``from_pretrained`` for teachers.
        trust_remote_code: run Python code that a teacher's repository ships.
        max_completion_length: tokens that the student writes.
        temperature: of writing and of the divergence.
        top_p: nucleus.
        top_k: 0 for no limit.
        min_p: smallest share of the likeliest token's probability.
        repetition_penalty: 1 for none.
        generation_kwargs: further arguments of ``generate``.
    """

    rollouts: ClassVar[str] = "student"  # the student writes all rows

    teacher_models: dict[str, Any] | None = None
    panel: dict[str, Any] | str | None = None
    combine: str = "route"
    teacher_weights: dict[str, Any] | None = None
    domain_weights: dict[str, Any] | None = None
    confidence_temperature: float = 1.0
    routes: dict[str, Any] | None = None
    estimator: str = "exact"
    top_k_tail: int = 64
    student_top_k: int | None = None
    ratio_bounds: tuple[float, float] = (0.5, 2.0)
    divergence: str | None = None
    beta: float = 1.0
    skew_alpha: float = 0.1
    teacher_model_name_or_path: str | None = None
    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.combine not in get_args(Combine):
            raise ConfigError(
                f"Unknown combine {self.combine!r}; expected one of {', '.join(get_args(Combine))}."
                + nearest(self.combine, list(get_args(Combine)))
            )
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; expected a positive number.")
        if self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}; expected at least 1.")
        self.resolved_divergence()

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

    def resolved_divergence(self) -> Divergence:
        """Return the divergence that ``divergence``, ``beta`` and ``skew_alpha`` name."""
        if self.divergence is None:
            return Divergence.from_beta(self.beta)
        return Divergence(self.divergence, beta=self.beta if self.divergence == "jsd" else 0.5, alpha=self.skew_alpha)

    def on_policy_schedule(self) -> Schedule:
        """Return the share of rows that the student writes: all, always."""
        return Schedule(1.0, 1.0)

    def sampling(self) -> Sampling:
        """Return how the student writes."""
        return Sampling(
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            self.generation_kwargs or {},
        )
