"""Configuration of the teacher panel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from trl import DistillationConfig

from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.panel import Combine
from kd_plugin.trl.rollout_fields import RolloutFields
from kd_plugin.trl.shared_fields import DistillationFields


@dataclass
class TeacherPanelConfig(RolloutFields, DistillationFields, DistillationConfig):
    """What TRL's ``DistillationConfig`` holds, and how a panel of teachers is combined.

    Every inherited field keeps its meaning. With one teacher and default settings the losses and gradients are
    those of ``DistillationTrainer``.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        *RolloutFields.ROLLOUT_DICT_FIELDS,
        "teacher_models",
        "teacher_weights",
        "routes",
        "lineage",
    ]

    teacher_models: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Name to path or hub id of each teacher. Used where the trainer is given none."},
    )
    combine: str = field(
        default="route",
        metadata={
            "help": "How teachers are combined: 'route' asks the one that the row's `teacher_id` names, 'weighted_kl' "
            "minimises the weighted sum of every teacher's divergence."
        },
    )
    teacher_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Name to weight, for 'weighted_kl'; scaled to sum to one. Equal where left out."},
    )
    routes: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Domain to teacher, for rows that have a `domain` and no `teacher_id`."},
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher), jsd (with `beta`), or "
            "skew_kl (with `skew_alpha`). Left out, `beta` decides as in TRL: 0 forward KL, 1 reverse KL, else JSD."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.combine not in get_args(Combine):
            raise ConfigError(
                f"Unknown combine {self.combine!r}; expected one of {', '.join(get_args(Combine))}."
                + nearest(self.combine, list(get_args(Combine)))
            )
        self.resolved_divergence()
        self.check_rollouts()

    def resolved_divergence(self) -> Divergence:
        """Return the divergence that ``divergence``, ``beta`` and ``skew_alpha`` name.

        Raises:
            ConfigError: an unknown name, or ``jsd`` with a ``beta`` at either end.
        """
        if self.divergence is None:
            return Divergence.from_beta(self.beta)
        beta = self.beta if self.divergence == "jsd" else 0.5
        return Divergence(self.divergence, beta=beta, alpha=self.skew_alpha)
