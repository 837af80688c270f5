"""Fields of a host's configuration that watch a run and act when it goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from kd_plugin.errors import ConfigError
from kd_plugin.monitor.alarm import AlarmSettings


@dataclass
class WatchFields:
    """Metrics, saved rollouts and guards; a base of each host's configuration."""

    watch_positions: int = field(
        default=64,
        metadata={
            "help": "Scored positions of a micro-batch whose full distributions are compared at logging steps: each "
            "teacher's entropy, agreement and support, and where teachers disagree. 0 leaves these metrics out."
        },
    )
    save_rollouts: int = field(
        default=0,
        metadata={
            "help": "Rows of each logging step and rank that are kept under output_dir/rollouts, for `kd-plugin trace`."
        },
    )
    save_rollouts_top_k: int = field(
        default=5, metadata={"help": "Tokens that each teacher would have written, kept with a saved rollout."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions that the limit cut out of the loss, as in GRPOConfig."}
    )
    repetition_stop: int = field(
        default=0,
        metadata={
            "help": "End a rollout when it has written the same sequence (of up to 32 tokens) this many times in a "
            "row; what follows is neither judged nor trained on. 0 is off."
        },
    )
    anchor_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of KL(student || its start), in nats a token, beside the panel's divergence. The start "
            "of a LoRA student is its base without the adapter; another student is copied. 0 is off."
        },
    )
    length_alarm: float = field(
        default=0.0,
        metadata={"help": "Ring when the mean response length leaves its start by this factor, up or down. 0 is off."},
    )
    truncation_alarm: float = field(
        default=0.0, metadata={"help": "Ring when this share of responses is cut by the limit. 0 is off."}
    )
    repetition_alarm: float = field(
        default=0.0, metadata={"help": "Ring when this share of 4-grams in responses is repeated. 0 is off."}
    )
    alarm_window: int = field(
        default=8, metadata={"help": "Generation batches that alarms average; the first window is the start."}
    )
    alarm_action: str = field(
        default="warn",
        metadata={
            "help": "What an alarm does: 'warn', 'lower_learning_rate' (by `alarm_factor`), or 'stop' after a save."
        },
    )
    alarm_factor: float = field(
        default=0.5, metadata={"help": "What the learning rate is multiplied by, for 'lower_learning_rate'."}
    )

    def check_watch(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            ConfigError: names the field, the value and what was expected.
        """
        for name in ("watch_positions", "save_rollouts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number of at least 0.")
        if self.save_rollouts_top_k < 1:
            raise ConfigError(f"save_rollouts_top_k is {self.save_rollouts_top_k}; expected a number of at least 1.")
        if self.repetition_stop < 0 or self.repetition_stop == 1:
            raise ConfigError(
                f"repetition_stop is {self.repetition_stop}; expected how often a sequence may come in a row, from 2, "
                "or 0 for no limit."
            )
        if not 0.0 <= self.anchor_weight < float("inf"):
            raise ConfigError(f"anchor_weight is {self.anchor_weight}; expected a number of at least 0.")
        self.alarm_settings()

    def alarm_settings(self) -> AlarmSettings:
        """Return the alarm that the fields describe."""
        return AlarmSettings(
            length=self.length_alarm,
            truncated=self.truncation_alarm,
            repetition=self.repetition_alarm,
            window=self.alarm_window,
            action=self.alarm_action,  # type: ignore[arg-type]
            factor=self.alarm_factor,
        )
