"""The name and the parameters of a divergence."""

from __future__ import annotations

from dataclasses import dataclass

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.settings import option, settings

NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


@dataclass(frozen=True)
class Divergence:
    """Which divergence D(teacher, student) a loss minimises.

    With teacher p and student q:

    - ``forward_kl``: KL(p ‖ q), covers all that the teacher might say.
    - ``reverse_kl``: KL(q ‖ p), punishes what the teacher would not say.
    - ``jsd``: β·KL(p ‖ m) + (1-β)·KL(q ‖ m) with m = β·p + (1-β)·q, as TRL's ``beta``
      (Agarwal et al., "On-Policy Distillation of Language Models", arXiv 2306.13649, eq. 1).
    - ``skew_kl``: KL(p ‖ α·p + (1-α)·q), bounded where q is tiny
      (Ko et al., "DistiLLM", arXiv 2402.03898, eq. 3).

    Attributes:
        name: one of the four above.
        beta: weight of the teacher in ``jsd``, strictly between 0 and 1.
        alpha: share of the teacher in ``skew_kl``'s mixture, in [0, 1).
    """

    name: str = "reverse_kl"
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(
                f"Unknown divergence {self.name!r}; expected one of {', '.join(NAMES)}." + nearest(self.name, NAMES)
            )
        if self.name == "jsd" and not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"jsd needs beta strictly between 0 and 1, got {self.beta}. For beta=0 use forward_kl, "
                "for beta=1 use reverse_kl."
            )
        if self.name == "skew_kl" and not 0.0 <= self.alpha < 1.0:
            raise ConfigError(f"skew_kl needs alpha in [0, 1), got {self.alpha}.")

    @classmethod
    def from_beta(cls, beta: float) -> Divergence:
        """Translate TRL's ``beta``: 0 is the forward KL, 1 the reverse KL, between them the JSD."""
        if beta == 0.0:
            return cls("forward_kl")
        return cls("reverse_kl") if beta == 1.0 else cls("jsd", beta=beta)


@settings
class DivergenceSettings:
    """Parameters of divergences; a base of the settings that name one."""

    skew_alpha: float = option(default=0.1, help="Share of the teacher in skew_kl's mixture, in [0, 1).")

    def chosen_divergence(self, name: str, *, beta: float) -> Divergence:
        """Return the divergence ``name`` with its parameters; ``beta`` is that of ``jsd``.

        Raises:
            ConfigError: an unknown name, or a parameter out of range.
        """
        return Divergence(name, beta=beta if name == "jsd" else 0.5, alpha=self.skew_alpha)
