"""A number that changes over training: weights of teachers, the share of on-policy rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kd_plugin.errors import ConfigError, nearest, require_known_keys

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Goes from ``start`` to ``end`` between two optimizer steps, and stays there.

    It depends on the step alone, so that a resumed run needs no state to go on where it was.

    Attributes:
        start: value until step ``begin``.
        end: value from step ``begin + steps`` on.
        steps: length of the way, in optimizer steps; 0 jumps at ``begin``.
        begin: first step of the way.
        shape: ``linear``, or ``cosine``, which starts and ends slowly.

    Raises:
        ConfigError: a step is negative, a value is not finite, or the shape is unknown.
    """

    start: float
    end: float
    steps: int = 0
    begin: int = 0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ConfigError(
                f"Unknown schedule shape {self.shape!r}; expected one of {', '.join(get_args(Shape))}."
                + nearest(str(self.shape), list(get_args(Shape)))
            )
        if self.steps < 0 or self.begin < 0:
            raise ConfigError(f"A schedule's steps are {self.steps} from {self.begin}; expected numbers of at least 0.")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ConfigError(f"A schedule goes from {self.start} to {self.end}; expected finite numbers.")

    def at(self, step: int) -> float:
        """Return the value at an optimizer step."""
        if step >= self.begin + self.steps:
            return self.end
        if step <= self.begin:
            return self.start
        way = (step - self.begin) / self.steps
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way

    def values(self) -> tuple[float, float]:
        """Return the smallest and the largest value that it takes."""
        return min(self.start, self.end), max(self.start, self.end)


def as_schedule(value: Any, name: str) -> Schedule:
    """Turn a number, or a mapping with :class:`Schedule`'s fields, into a schedule.

    Args:
        value: a number, a mapping such as ``{"start": 0.0, "end": 1.0, "steps": 200}``, or a schedule.
        name: of the option, for errors.

    Raises:
        ConfigError: neither, an unknown key, or ``start`` or ``end`` is missing.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Schedule(float(value), float(value))
    known = [field.name for field in fields(Schedule)]
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; expected a number or a mapping with {', '.join(known)}.")
    require_known_keys(value, known, name)
    missing = [key for key in ("start", "end") if key not in value]
    if missing:
        raise ConfigError(f"{name} lacks {' and '.join(missing)}; a schedule goes from `start` to `end` in `steps`.")
    return Schedule(**value)
