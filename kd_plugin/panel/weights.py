"""How much each teacher counts: by teacher, by domain and by row, and how that changes over training.

A schedule is a number that changes: a weight, or the share of on-policy rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kd_plugin.errors import ConfigError, DataError, nearest, require_known_keys

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


class TeacherWeights:
    """The weights of a panel's teachers.

    Args:
        names: the teachers.
        teachers: name to weight; equal where left out, 0 for a teacher that the mapping leaves out.
        domains: domain to such a mapping; in that domain it stands in the place of ``teachers``.

    Raises:
        ConfigError: a name that is not on the panel, a bad weight, or weights that sum to zero at some step.
    """

    def __init__(
        self,
        names: Sequence[str],
        teachers: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.teachers = self._parsed(names, teachers, "teacher_weights")
        self.domains = {
            domain: self._parsed(names, weights, f"domain_weights[{domain!r}]")
            for domain, weights in (domains or {}).items()
        }

    def of(
        self, teachers: Sequence[str], *, domain: str | None = None, row: Sequence[float] | None = None, step: int = 0
    ) -> tuple[float, ...]:
        """Return the weights of a row's teachers, scaled to sum to one.

        Args:
            teachers: names of those who score it.
            domain: the row's domain.
            row: the row's own weights, in the order of ``teachers``; they stand in the place of all others.
            step: optimizer step.

        Raises:
            DataError: they sum to zero.
        """
        if row is not None:
            chosen = list(row)
        else:
            schedules = self.domains.get(domain, self.teachers) if domain is not None else self.teachers
            chosen = [schedules[name].at(step) for name in teachers]
        total = math.fsum(chosen)
        if total <= 0.0:
            raise DataError(
                f"The teachers of a row, {', '.join(map(repr, teachers))}, have weights that sum to zero at step "
                f"{step}. Give one of them a positive weight, or name other teachers in teacher_id."
            )
        return tuple(weight / total for weight in chosen)

    def turning_points(self) -> list[int]:
        """Return the steps at which a schedule begins or has arrived; between them every weight goes one way."""
        schedules = [s for mapping in (self.teachers, *self.domains.values()) for s in mapping.values()]
        return sorted({step for s in schedules if s.start != s.end for step in (s.begin, s.begin + s.steps)} | {0})

    @staticmethod
    def _parsed(names: Sequence[str], given: Mapping[str, Any] | None, where: str) -> dict[str, Schedule]:
        if given is None:
            return dict.fromkeys(names, Schedule(1.0, 1.0))
        for name in given:
            if name not in names:
                raise ConfigError(
                    f"{where} names {name!r}, which is not on the panel; there are {', '.join(map(repr, names))}."
                    + nearest(str(name), list(names))
                )
        parsed = {name: _weight(given.get(name, 0.0), f"The weight of teacher {name!r} in {where}") for name in names}
        steps = {step for s in parsed.values() for step in (s.begin, s.begin + s.steps)}
        for step in sorted(steps):
            if math.fsum(schedule.at(step) for schedule in parsed.values()) <= 0.0:
                raise ConfigError(
                    f"{where} sum to zero at step {step}; give at least one teacher a positive weight there."
                )
        return parsed


def _weight(given: Any, where: str) -> Schedule:
    schedule = as_schedule(given, where)
    if schedule.values()[0] < 0.0:
        raise ConfigError(f"{where} is {schedule.values()[0]}; expected a number of at least 0.")
    return schedule


def row_weights(given: Any, teachers: Sequence[str]) -> tuple[float, ...] | None:
    """Read a row's ``teacher_weights``: a mapping from name to weight, or a list in the order of ``teacher_id``.

    Raises:
        DataError: a name that does not score the row, another number of weights, one that is no number of at least
            0, or weights that sum to zero.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        # Datasets fill in None for names that other rows have
        present = {name: weight for name, weight in given.items() if weight is not None}
        stray = [name for name in present if name not in teachers]
        if stray:
            raise DataError(
                f"A row's teacher_weights names {stray[0]!r}, which does not score it; its teachers are "
                f"{', '.join(map(repr, teachers))}." + nearest(stray[0], list(teachers))
            )
        values: Iterable[Any] = [present.get(name, 0.0) for name in teachers]
    else:
        values = list(given)
    weights = tuple(values)
    if len(weights) != len(teachers):
        raise DataError(f"A row has {len(weights)} teacher_weights for {len(teachers)} teachers; expected one each.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise DataError(f"A row's teacher_weights hold {weight!r}; expected numbers of at least 0.")
    if math.fsum(weights) <= 0.0:
        raise DataError(f"A row's teacher_weights sum to zero: {list(weights)}. Give one teacher a positive weight.")
    return tuple(float(weight) for weight in weights)
