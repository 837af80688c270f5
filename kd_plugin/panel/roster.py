"""Who is on the panel, and who judges which row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

from kd_plugin.errors import ConfigError, DataError, nearest
from kd_plugin.teachers.base import Teacher
from kd_plugin.teachers.local import LocalTeacher

Combine = Literal["route", "weighted_kl"]


class TeacherPanel:
    """Several teachers over one vocabulary, and how their corrections are combined.

    Args:
        teachers: name to teacher; a path, a hub id or a loaded model becomes a :class:`LocalTeacher`.
        combine: ``route`` asks one teacher a row, named in the row's ``teacher_id``. ``weighted_kl`` asks
            all of them, or those that ``teacher_id`` lists, and minimises Σ wᵢ·D(teacherᵢ, student), the
            objective of DeepSeek-V4 (arXiv 2606.19348, 5.1.2).
        weights: name to weight, for ``weighted_kl``; equal when left out. They are scaled to sum to one over
            the teachers that judge a row, so that the size of the panel does not change the learning rate.
        routes: domain to teacher or teachers, for rows that have a ``domain`` and no ``teacher_id``.

    Raises:
        ConfigError: no teacher, an unknown ``combine``, a weight or a route that names no teacher, a
            negative weight, or weights that sum to zero.
    """

    def __init__(
        self,
        teachers: Mapping[str, Any],
        *,
        combine: Combine = "route",
        weights: Mapping[str, float] | None = None,
        routes: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        if not teachers:
            raise ConfigError("A teacher panel needs at least one teacher; got none.")
        if combine not in get_args(Combine):
            raise ConfigError(
                f"Unknown combine {combine!r}; expected one of {', '.join(get_args(Combine))}."
                + nearest(str(combine), list(get_args(Combine)))
            )
        self.combine: Combine = combine
        self.teachers: Mapping[str, Teacher] = MappingProxyType(
            {name: as_teacher(name, teacher) for name, teacher in teachers.items()}
        )
        self.weights = self._checked_weights(weights)
        self.routes = {domain: self._known(names) for domain, names in (routes or {}).items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, in the order given."""
        return tuple(self.teachers)

    def judges(self, teacher_id: str | Sequence[str] | None, domain: str | None = None) -> tuple[str, ...]:
        """Return the names of the teachers that judge a row.

        Args:
            teacher_id: the row's ``teacher_id``: a name, a list of names, or None.
            domain: the row's ``domain``, used through ``routes`` where ``teacher_id`` is None.

        Raises:
            DataError: the row names a teacher that is not on the panel, or names none where it must.
        """
        if teacher_id is None and domain is not None and self.routes:
            if domain not in self.routes:
                raise DataError(
                    f"No teacher for domain {domain!r}; routes exist for {_listed(self.routes)}."
                    + nearest(domain, list(self.routes))
                )
            chosen = self.routes[domain]
        elif teacher_id is None:
            if self.combine == "route" and len(self.teachers) > 1:
                raise DataError(
                    "With combine='route' and several teachers each row must say who judges it. Add a column "
                    f"'teacher_id' holding one of {_listed(self.teachers)}, or set routes and a column 'domain', "
                    "or combine='weighted_kl' to ask all of them."
                )
            chosen = self.names
        else:
            chosen = self._known(teacher_id)
        if self.combine == "route" and len(chosen) != 1:
            raise DataError(
                f"combine='route' asks one teacher a row, but a row names {len(chosen)}: {_listed(chosen)}. "
                "Use combine='weighted_kl' to ask several."
            )
        return chosen

    def weights_of(self, judges: Sequence[str]) -> tuple[float, ...]:
        """Return the weights of ``judges``, scaled to sum to one."""
        if self.combine == "route":
            return (1.0,) * len(judges)
        chosen = [self.weights[name] for name in judges]
        total = math.fsum(chosen)
        if total <= 0.0:
            raise DataError(f"The teachers of a row, {_listed(judges)}, have weights that sum to zero.")
        return tuple(weight / total for weight in chosen)

    def _known(self, names: str | Iterable[str]) -> tuple[str, ...]:
        listed = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        for name in listed:
            if name not in self.teachers:
                raise DataError(
                    f"teacher_id {name!r} names no teacher of this panel; there are {_listed(self.teachers)}."
                    + nearest(str(name), list(self.teachers))
                )
        if not listed:
            raise DataError(f"teacher_id is an empty list; name at least one of {_listed(self.teachers)}.")
        return listed

    def _checked_weights(self, weights: Mapping[str, float] | None) -> dict[str, float]:
        if weights is None:
            return dict.fromkeys(self.teachers, 1.0)
        if self.combine == "route":
            raise ConfigError("teacher_weights have no meaning with combine='route', where one teacher judges a row.")
        for name, weight in weights.items():
            if name not in self.teachers:
                raise ConfigError(
                    f"teacher_weights names {name!r}, which is not on the panel; there are {_listed(self.teachers)}."
                    + nearest(name, list(self.teachers))
                )
            if not (math.isfinite(weight) and weight >= 0.0):
                raise ConfigError(f"The weight of teacher {name!r} is {weight}; expected a number of at least 0.")
        complete = {name: float(weights.get(name, 0.0)) for name in self.teachers}
        if math.fsum(complete.values()) <= 0.0:
            raise ConfigError("teacher_weights sum to zero; give at least one teacher a positive weight.")
        return complete


def as_teacher(name: str, teacher: Any) -> Teacher:
    """Return ``teacher`` itself if it is one, else a :class:`LocalTeacher` over the model or path."""
    if isinstance(teacher, Teacher):
        return teacher
    return LocalTeacher(teacher, name=name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
