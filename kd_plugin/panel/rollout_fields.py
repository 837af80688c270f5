"""Fields of a host's configuration that say what is corrected: whose text, and from when on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.panel.schedule import Schedule, as_schedule
from kd_plugin.rollouts.decoding import Draws

ROLLOUTS = ("student", "interleaved")
DRAWS = get_args(Draws)


@dataclass
class RolloutFields:
    """Who writes the completions that the panel corrects; a base of each host's configuration."""

    ROLLOUT_DICT_FIELDS: ClassVar[list[str]] = ["on_policy_fraction"]

    rollouts: str = field(
        default="student",
        metadata={
            "help": "'student' lets it write alone, as in TRL. 'interleaved' (speculative KD) lets the panel replace "
            "each token that it does not rank among its first `interleaved_top_k`."
        },
    )
    rollout_draws: str = field(
        default="multinomial",
        metadata={
            "help": "'multinomial' draws the tokens that TRL draws with the same seed. 'uniform' draws from the same "
            "distribution with one random number a row instead of one a token of the vocabulary, which is faster on "
            "CPUs."
        },
    )
    interleaved_top_k: int = field(
        default=25, metadata={"help": "Rank up to which the panel lets a student's token stand, for 'interleaved'."}
    )
    interleaved_block: int = field(
        default=16, metadata={"help": "Tokens that the student proposes before the panel is asked, for 'interleaved'."}
    )
    on_policy_fraction: dict[str, Any] | str | None = field(  # or a number; one type is all that the parser takes
        default=None,
        metadata={
            "help": "Share of rows whose completion the student writes; the dataset's `completion` fills the others. "
            "A number, or a schedule over optimizer steps such as {start: 0, end: 1, steps: 200}. Left out, all rows."
        },
    )
    warmup_cache: str | None = field(
        default=None,
        metadata={
            "help": "Teacher cache, or several with commas between, that the first `warmup_cache_steps` fit offline."
        },
    )
    warmup_cache_steps: int = field(
        default=0, metadata={"help": "Optimizer steps on `warmup_cache` before the student writes its own text."}
    )
    warmup_divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence of the steps on `warmup_cache`, at the captured temperature."},
    )
    allow_misaligned: bool = field(
        default=False,
        metadata={
            "help": "Warm up on a `warmup_cache` whose targets seem to belong to the token beside, with a warning."
        },
    )

    def check_rollouts(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            ConfigError: a value is out of range, or contradicts another.
        """
        if self.rollouts not in ROLLOUTS:
            raise ConfigError(
                f"Unknown rollouts {self.rollouts!r}; expected one of {', '.join(ROLLOUTS)}."
                + nearest(self.rollouts, list(ROLLOUTS))
            )
        if self.rollout_draws not in DRAWS:
            raise ConfigError(
                f"Unknown rollout_draws {self.rollout_draws!r}; expected one of {', '.join(DRAWS)}."
                + nearest(self.rollout_draws, list(DRAWS))
            )
        if self.interleaved_top_k < 1 or self.interleaved_block < 1:
            raise ConfigError(
                f"interleaved_top_k is {self.interleaved_top_k} and interleaved_block {self.interleaved_block}; "
                "expected numbers of at least 1."
            )
        lowest, highest = self.on_policy_schedule().values()
        if not 0.0 <= lowest <= highest <= 1.0:
            raise ConfigError(f"on_policy_fraction goes from {lowest} to {highest}; expected shares between 0 and 1.")
        if self.warmup_cache_steps < 0:
            raise ConfigError(f"warmup_cache_steps is {self.warmup_cache_steps}; expected a number of at least 0.")
        if self.warmup_cache_steps and not self.warmup_cache:
            raise ConfigError("warmup_cache_steps is set, but no warmup_cache; name the cache to warm up on.")
        if self.warmup_cache and not self.warmup_cache_steps:
            raise ConfigError("warmup_cache is set, but warmup_cache_steps is 0; say how many steps to fit it.")

    def on_policy_schedule(self) -> Schedule:
        """Return ``on_policy_fraction`` as a schedule."""
        value: Any = 1.0 if self.on_policy_fraction is None else self.on_policy_fraction
        if isinstance(value, str):
            with suppress(ValueError):  # the schedule's own error names what was seen
                value = float(value)
        return as_schedule(value, "on_policy_fraction")

    def warmup_caches(self) -> list[str]:
        """Return the directories that ``warmup_cache`` names."""
        return [path.strip() for path in (self.warmup_cache or "").split(",") if path.strip()]
