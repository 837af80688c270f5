"""What notices that a run goes wrong: rollouts that grow, shrink, run into the limit or repeat themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.rollouts.responses import Response, repetition

AlarmAction = Literal["warn", "lower_learning_rate", "stop"]


@dataclass(frozen=True)
class AlarmSettings:
    """When a run is thought to go wrong, and what is done then.

    Attributes:
        length: factor over the first window's mean response length, above or below which it rings; 0 is off.
        truncated: share of responses cut by the limit; 0 is off.
        repetition: share of repeated 4-grams; 0 is off.
        window: generation batches that are averaged; the first window is the baseline.
        action: ``warn``, ``lower_learning_rate`` by ``factor``, or ``stop`` after a save.
        factor: what the learning rate is multiplied by.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    length: float = 0.0
    truncated: float = 0.0
    repetition: float = 0.0
    window: int = 8
    action: AlarmAction = "warn"
    factor: float = 0.5

    def __post_init__(self) -> None:
        if self.length and self.length <= 1.0:
            raise ConfigError(f"length_alarm is {self.length}; expected a factor above 1, such as 2, or 0 for none.")
        for name in ("truncated", "repetition"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}_alarm is {getattr(self, name)}; expected a share between 0 and 1.")
        if self.window < 1:
            raise ConfigError(f"alarm_window is {self.window}; expected at least one generation batch.")
        if self.action not in get_args(AlarmAction):
            raise ConfigError(
                f"Unknown alarm_action {self.action!r}; expected one of {', '.join(get_args(AlarmAction))}."
                + nearest(self.action, list(get_args(AlarmAction)))
            )
        if not 0.0 < self.factor < 1.0:
            raise ConfigError(f"alarm_factor is {self.factor}; expected a number between 0 and 1.")

    @property
    def is_set(self) -> bool:
        """Whether anything can ring it."""
        return bool(self.length or self.truncated or self.repetition)


@dataclass(frozen=True)
class Responses:
    """What is seen of the responses of a generation batch, over all ranks.

    Attributes:
        length: mean tokens.
        truncated: share that the limit cut.
        repetition: mean share of repeated 4-grams.
    """

    length: float
    truncated: float
    repetition: float


class LengthAlarm:
    """Rings when responses grow, shrink, run into the limit, or repeat themselves, averaged over a window.

    Length inflation and truncation collapse are how on-policy distillation is known to fail (arXiv 2604.08527). After
    it rang it is quiet for a window. It is a function of what it saw, so ranks that see the same agree.
    """

    def __init__(self, settings: AlarmSettings) -> None:
        self.settings = settings
        self._seen: deque[Responses] = deque(maxlen=settings.window)
        self._baseline: float | None = None
        self._quiet = 0

    def observe(self, responses: Responses) -> str | None:
        """Take in a generation batch; return what is wrong, in words, or None."""
        self._seen.append(responses)
        if len(self._seen) < self.settings.window:
            return None
        count = len(self._seen)
        length = sum(r.length for r in self._seen) / count
        truncated = sum(r.truncated for r in self._seen) / count
        repeated = sum(r.repetition for r in self._seen) / count
        if self._baseline is None:
            self._baseline = length
        if self._quiet:
            self._quiet -= 1
            return None
        found = []
        factor, start = self.settings.length, max(self._baseline, 1.0)
        if factor and length > factor * start:
            found.append(f"responses grew from {start:.1f} to {length:.1f} tokens")
        if factor and length * factor < start:
            found.append(f"responses shrank from {start:.1f} to {length:.1f} tokens")
        if self.settings.truncated and truncated >= self.settings.truncated:
            found.append(f"{truncated:.0%} of responses are cut by the limit")
        if self.settings.repetition and repeated >= self.settings.repetition:
            found.append(f"{repeated:.0%} of 4-grams are repeated")
        if found:
            self._quiet = self.settings.window
        return "; ".join(found) or None

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` goes on from, JSON-ready."""
        seen = [[r.length, r.truncated, r.repetition] for r in self._seen]
        return {"seen": seen, "baseline": self._baseline, "quiet": self._quiet}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._seen = deque((Responses(*values) for values in state["seen"]), maxlen=self.settings.window)
        self._baseline, self._quiet = state["baseline"], state["quiet"]


def lower_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of all groups, and of the schedule that goes on from there, by ``factor``.

    Args:
        optimizer: its groups' rate holds until the schedule sets it anew.
        scheduler: its base rates, which checkpoints keep; None where there is none.
        factor: between 0 and 1.
    """
    if scheduler is not None:
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= factor


def response_sums(written: Sequence[Response]) -> list[float]:
    """Return rows, tokens, truncated rows and repetition; their sums over all ranks go into :func:`responses_of`."""
    tokens = [one.tokens for one in written]
    return [len(tokens), sum(map(len, tokens)), sum(one.truncated for one in written), sum(map(repetition, tokens))]


def responses_of(sums: Sequence[float]) -> Responses:
    """Return the means of :func:`response_sums` for the alarm."""
    rows, tokens, cut, repeated = sums
    rows = max(rows, 1)
    return Responses(tokens / rows, cut / rows, repeated / rows)
