"""Fields of a host's configuration that say who is on the panel and how its teachers are combined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.roster import Combine


@dataclass
class PanelFields:
    """The panel; a base of each host's configuration, which brings ``beta`` and ``skew_alpha``."""

    PANEL_DICT_FIELDS: ClassVar[list[str]] = ["teacher_models", "teacher_weights", "domain_weights", "routes", "panel"]
    teacher_models: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Name to path or hub id of each teacher. Used where the trainer is given none."},
    )
    combine: str = field(
        default="route",
        metadata={
            "help": "How teachers are combined: 'route' asks the one that the row's `teacher_id` names, 'weighted_kl' "
            "minimises the weighted sum of every teacher's divergence, 'mixture' the divergence from the weighted mean "
            "of their probabilities, 'confidence' a sum whose weights follow each teacher's entropy at each token."
        },
    )
    teacher_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Name to weight, for all but 'route'; scaled to sum to one. Equal where left out. A weight is a "
            "number, or a schedule: {start: 0.0, end: 1.0, steps: 200, begin: 0, shape: linear}."
        },
    )
    domain_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Domain to such a mapping, for rows with that `domain`, in the place of `teacher_weights`."},
    )
    confidence_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Nats, for 'confidence': a small one leaves the surest teacher alone at each token, a large one "
            "leaves `teacher_weights`."
        },
    )
    routes: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Domain to teacher, for rows that have a `domain` and no `teacher_id`."},
    )
    panel: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The whole panel in one block, or a path to YAML with it: `teachers` (each with its `kind`), "
            "`combine`, `divergence`, weights, `routes`, `estimator`. In the place of the fields above."
        },
    )
    estimator: str = field(
        default="exact",
        metadata={
            "help": "How divergences are estimated: 'exact' (teachers in this process), 'sampled' (policy gradient on "
            "the written token; reverse_kl only) or 'topk_tail' (listed tokens and the rest as one)."
        },
    )
    top_k_tail: int = field(
        default=64, metadata={"help": "Tokens that 'topk_tail' lists of a teacher in this process."}
    )
    student_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the student that 'topk_tail' lists beside, where the teacher is in this process. Left "
            "out, as many as of the teacher. 0 makes it equal to a server's list of `top_k_tail` tokens."
        },
    )
    ratio_bounds: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={
            "help": "For 'sampled': between which the ratio of the student's probability of a token now to that when "
            "it was written is kept."
        },
    )
    panel_values: str = field(
        default="always",
        metadata={
            "help": "'always' computes every teacher's divergence at each step. 'logging' does so at logging steps "
            "only; between them teachers that share a head are projected together (reverse_kl), with the same "
            "gradient. The logged loss is then that of the logging step."
        },
    )
    allow_other_eos: bool = field(
        default=False,
        metadata={
            "help": "Take teachers that end their responses with another token than the student, which are refused: "
            "the student would unlearn to stop."
        },
    )
    allow_changed_panel: bool = field(
        default=False,
        metadata={
            "help": "Resume although the panel is not the one of the checkpoint; what changed then stands in the "
            "lineage. Without it such a resume is refused."
        },
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher), jsd (with `beta`), or "
            "skew_kl (with `skew_alpha`). Left out, `beta` decides as in TRL: 0 forward KL, 1 reverse KL, else JSD."
        },
    )

    def check_panel(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            ConfigError: an unknown name, or a value out of range.
        """
        if self.combine not in get_args(Combine):
            raise ConfigError(
                f"Unknown combine {self.combine!r}; expected one of {', '.join(get_args(Combine))}."
                + nearest(self.combine, list(get_args(Combine)))
            )
        if self.panel_values not in ("always", "logging"):
            raise ConfigError(
                f"Unknown panel_values {self.panel_values!r}; expected one of always, logging."
                + nearest(self.panel_values, ["always", "logging"])
            )
        if len(self.ratio_bounds) != 2:
            raise ConfigError(f"ratio_bounds are {self.ratio_bounds}; expected two numbers, low and high.")
        Estimator(self.estimator, self.top_k_tail, self.student_top_k, tuple(self.ratio_bounds))  # type: ignore[arg-type]
        self.resolved_divergence()

    def resolved_divergence(self) -> Divergence:
        """Return the divergence that ``divergence``, ``beta`` and ``skew_alpha`` name.

        Raises:
            ConfigError: an unknown name, or ``jsd`` with a ``beta`` at either end.
        """
        if self.divergence is None:
            return Divergence.from_beta(self.beta)  # type: ignore[attr-defined]
        beta = self.beta if self.divergence == "jsd" else 0.5  # type: ignore[attr-defined]
        return Divergence(self.divergence, beta=beta, alpha=self.skew_alpha)  # type: ignore[attr-defined]
