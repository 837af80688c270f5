"""What notices that a run goes wrong: rollouts that grow, shrink, run into the limit or repeat themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugin.panel.settings import AlarmSettings
from kd_plugin.rollouts.responses import Response, repetition


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


def response_sums(responses: Sequence[Response]) -> list[float]:
    """Return rows, tokens, truncated rows and repetition; their sums over all ranks go into :func:`responses_of`."""
    tokens = [one.tokens for one in responses]
    return [len(tokens), sum(map(len, tokens)), sum(one.truncated for one in responses), sum(map(repetition, tokens))]


def responses_of(sums: Sequence[float]) -> Responses:
    """Return the means of :func:`response_sums` for the alarm."""
    rows, tokens, cut, repeated = sums
    rows = max(rows, 1)
    return Responses(tokens / rows, cut / rows, repeated / rows)
