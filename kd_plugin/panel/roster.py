"""Who is on the panel, and who scores which row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from kd_plugin.divergence.modes import MODES, Combine
from kd_plugin.divergence.projection import require_temperature
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError, DataError, nearest
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.text.reward import Reward
from kd_plugin.panel.weights import TeacherWeights, row_weights
from kd_plugin.settings import require_known
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.adapter import share_bases
from kd_plugin.teachers.base import Teacher, missing_members
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.text.prompts import Templates
from kd_plugin.text.rounds import RECORDED
from kd_plugin.text.spending import Prices
from kd_plugin.text.teaching import TextTeacher, is_text_teacher
from kd_plugin.verifying import Verifier
from kd_plugin.views.view import View

_BY_TEXT = Estimator("topk_tail"), Divergence("forward_kl")  # cross-entropy with a list of one token


@dataclass(frozen=True)
class Assignment:
    """Who scores a row.

    Attributes:
        teachers: names of its teachers.
        domain: the row's domain, which may decide their weights.
        weights: the row's own weights, one a teacher, or None.
    """

    teachers: tuple[str, ...]
    domain: str | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class OwnTerms:
    """How one teacher is compared with the student, where that is not how the others are.

    Attributes:
        divergence: or None for the run's.
        temperature: divides the logits of both sides, in a mixture the teacher's alone; or None for the run's.
        estimator: or None for the panel's.
        view: how it reads what the student generated; None reads the student's own prompt and tokens.

    Raises:
        ConfigError: a temperature that cannot divide logits.
    """

    divergence: Divergence | None = None
    temperature: float | None = None
    estimator: Estimator | None = None
    view: View | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            require_temperature(self.temperature)

    def temperature_or(self, run: float) -> float:
        """Return the teacher's own temperature, or that of the run where it has none."""
        return run if self.temperature is None else self.temperature


class TeacherPanel:
    """Several teachers over one vocabulary, and how their scores are combined.

    Args:
        teachers: name to teacher; a path, a hub id or a loaded model becomes a :class:`LocalTeacher`. A
            :class:`~kd_plugin.text.teaching.TextTeacher` evaluates and corrects by text.
        combine: ``route`` asks one teacher a row, named in the row's ``teacher_id``. The others ask all of them, or
            those that ``teacher_id`` lists. ``weighted_kl`` minimises Σ wᵢ·D(teacherᵢ, student), the objective of
            DeepSeek-V4 (arXiv 2606.19348, 5.1.2). ``mixture`` minimises D(Σ wᵢ·pᵢ, student). ``confidence`` is
            ``weighted_kl`` with weights that differ from token to token: wᵢ·exp(-entropy of pᵢ /
            ``confidence_temperature``).
        weights: name to weight, a number or a :class:`Schedule` (or its mapping); equal when left out. Weights
            are scaled to sum to one over the teachers that score a row, so that the size of the panel does not
            change the learning rate.
        domain_weights: domain to such a mapping, in the place of ``weights`` for its rows.
        routes: domain to teacher or teachers, for rows that have a ``domain`` and no ``teacher_id``.
        confidence_temperature: nats; a small one leaves the surest teacher alone, a large one leaves ``weights``.
        own: name to what is special about that teacher.
        estimator: how the divergence is estimated, for teachers without an estimator of their own.
        divergence: of the panel; None leaves it to the host's configuration.
        allow_other_eos: take teachers that end their responses with another token than the student.
        text: how text teachers evaluate and correct.
        reward: of a verifier, which weighs the divergence from teachers that give distributions; or None.
        prices: name to what a teacher's tokens cost.

    Attributes:
        members: name to teacher, all of them.
        teachers: those that give distributions.
        text_teachers: those that evaluate and correct.

    Raises:
        ConfigError: no teacher, an unknown ``combine``, a name that is on no panel, a negative weight, weights that
            sum to zero, or a combination that is not defined.
    """

    def __init__(
        self,
        teachers: Mapping[str, Any],
        *,
        combine: Combine = "route",
        weights: Mapping[str, Any] | None = None,
        domain_weights: Mapping[str, Mapping[str, Any]] | None = None,
        routes: Mapping[str, str | Sequence[str]] | None = None,
        confidence_temperature: float = 1.0,
        own: Mapping[str, OwnTerms] | None = None,
        estimator: Estimator | None = None,
        divergence: Divergence | None = None,
        allow_other_eos: bool = False,
        text: CorrectionSettings | None = None,
        reward: Reward | None = None,
        prices: Mapping[str, Prices | Mapping[str, float]] | None = None,
    ) -> None:
        if not teachers:
            raise ConfigError("A teacher panel needs at least one teacher; got none.")
        require_known("combine", combine, tuple(MODES))
        self.combine: Combine = combine
        self.mode = MODES[combine]
        text_teachers: dict[str, TextTeacher] = {n: t for n, t in teachers.items() if is_text_teacher(t)}
        scoring = {name: as_teacher(name, t) for name, t in teachers.items() if name not in text_teachers}
        self.text_teachers: Mapping[str, TextTeacher] = MappingProxyType(text_teachers)
        self.teachers: Mapping[str, Teacher] = MappingProxyType(scoring)
        self.members: Mapping[str, Teacher | TextTeacher] = MappingProxyType(
            {name: text_teachers.get(name) or scoring[name] for name in teachers}
        )
        share_bases(self.teachers.values())
        if self.mode.one_teacher and (weights is not None or domain_weights is not None):
            raise ConfigError(
                f"teacher_weights have no meaning with combine={combine!r}, where one teacher scores a row."
            )
        self.weights = TeacherWeights(self.names, weights, domain_weights)
        if not (math.isfinite(confidence_temperature) and confidence_temperature > 0.0):
            raise ConfigError(
                f"confidence_temperature is {confidence_temperature}; it divides entropies and must be positive."
            )
        self.confidence_temperature = confidence_temperature
        self.estimator = estimator or Estimator()
        self.divergence = divergence
        self.allow_other_eos = allow_other_eos
        self.own = {name: OwnTerms() for name in self.members} | dict(own or {})
        for name in (*self.own, *(prices or {})):
            if name not in self.members:
                raise ConfigError(
                    f"Settings are given for teacher {name!r}, which is not on the panel; there are "
                    f"{_listed(self.members)}." + nearest(name, list(self.members))
                )
        self.reward = reward
        self.prices = {name: Prices.of((prices or {}).get(name)) for name in self.members}
        self.text = CorrectionSettings() if text is None else text
        self._settle_text(text)
        self.routes = {domain: self._known(names) for domain, names in (routes or {}).items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, in the order given."""
        return tuple(self.members)

    @property
    def views(self) -> dict[str, View]:
        """The views of those teachers that have one."""
        return {name: own.view for name, own in self.own.items() if own.view is not None}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a row that views, verifiers and text teachers read, beside ``prompt``.

        What says nothing of what it reads, such as a function, has the column of the answer.
        """
        found = [column for view in self.views.values() for column in view.columns]
        checks = [one.columns for one in self.verifiers]
        for columns in checks:
            found += columns or ()
        if self.text_teachers or None in checks:
            found.append(self.text.answer_column)
        if self.text.recorded:
            found += RECORDED
        return tuple(dict.fromkeys(found))

    @property
    def verifiers(self) -> list[Verifier]:
        """What decides whether a response, or a correction, is right."""
        checks = [self.text.check() if self.text_teachers else None, None if self.reward is None else self.reward.check]
        return [one for one in checks if one is not None]

    def teachers_of(self, teacher_id: str | Sequence[str] | None, domain: str | None = None) -> tuple[str, ...]:
        """Return the names of the teachers that score a row.

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
            if self.mode.one_teacher and len(self.members) > 1:
                raise DataError(
                    f"With combine={self.combine!r} and several teachers each row must say who scores it. Add a column "
                    f"'teacher_id' holding one of {_listed(self.members)}, or set routes and a column 'domain', "
                    "or combine='weighted_kl' to ask all of them."
                )
            chosen = self.names
        else:
            chosen = self._known(teacher_id)
        if self.mode.one_teacher and len(chosen) != 1:
            raise DataError(
                f"combine={self.combine!r} asks one teacher a row, but a row names {len(chosen)}: {_listed(chosen)}. "
                "Use combine='weighted_kl' to ask several."
            )
        return chosen

    def assign(self, row: Mapping[str, Any]) -> Assignment:
        """Read who scores a row from its ``teacher_id``, ``domain`` and ``teacher_weights``; each may be left out.

        Raises:
            DataError: as :meth:`teachers_of`, and for weights that do not fit the teachers or sum to zero.
        """
        domain = row.get("domain")
        teachers = self.teachers_of(row.get("teacher_id"), domain)
        own = row_weights(row.get("teacher_weights"), teachers)
        if own is not None and self.mode.one_teacher:
            raise DataError(
                f"A row has teacher_weights, which have no meaning with combine={self.combine!r}, where one teacher "
                "scores a row. Remove the column, or use combine='weighted_kl'."
            )
        by_text = [name for name in teachers if name in self.text_teachers]
        if len(by_text) == 1 and self.text.accepts == "majority":
            raise DataError(
                f"A row names one text teacher, {by_text[0]!r}, and a correction is accepted by a majority of the "
                "others. Name several in its teacher_id, or set a verifier or accept: teacher."
            )
        assignment = Assignment(teachers, domain, own)
        for step in self.weights.turning_points():
            self.weights_of(assignment, step)
        return assignment

    def weights_of(self, assignment: Assignment, step: int = 0) -> tuple[float, ...]:
        """Return the weights of a row's teachers at an optimizer step, scaled to sum to one.

        Raises:
            DataError: they sum to zero.
        """
        if self.mode.one_teacher:
            return (1.0,) * len(assignment.teachers)
        return self.weights.of(assignment.teachers, domain=assignment.domain, row=assignment.weights, step=step)

    def sharded_heads(self) -> dict[str, OutputHead]:
        """Return the output heads of those teachers that are sharded over the ranks, in the panel's order."""
        sharded: dict[str, Any] = {n: t for n, t in self.teachers.items() if t.capabilities.sharded}
        return {name: teacher.head for name, teacher in sharded.items()}

    def _known(self, names: str | Iterable[str]) -> tuple[str, ...]:
        listed = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        for name in listed:
            if name not in self.members:
                raise DataError(
                    f"teacher_id {name!r} names no teacher of this panel; there are {_listed(self.members)}."
                    + nearest(str(name), list(self.members))
                )
        if not listed:
            raise DataError(f"teacher_id is an empty list; name at least one of {_listed(self.members)}.")
        return listed

    def _settle_text(self, given: CorrectionSettings | None) -> None:
        """Refuse what text teachers cannot do, and tell them what to ask by.

        Raises:
            ConfigError: says what is not defined, and what is.
        """
        if self.reward is not None and not self.teachers:
            raise ConfigError(
                "A reward weighs the divergence from teachers that give distributions, and the panel has none. Add "
                "one, or leave reward out."
            )
        if not self.text_teachers:
            if given is not None:
                raise ConfigError(
                    "The panel has settings `text`, and no text teacher that they could apply to. Give one, such as "
                    "{kind: server, signal: text, url: ...}, or leave `text` out."
                )
            return
        if self.mode.needs:
            raise ConfigError(
                f"combine={self.combine!r} needs {self.mode.needs}, which teacher {next(iter(self.text_teachers))!r} "
                "does not give: it corrects by text. Use combine='weighted_kl' or 'route'."
            )
        if self.text.accepts == "majority" and (len(self.text_teachers) < 2 or self.mode.one_teacher):
            raise ConfigError(
                "Corrections are accepted by a majority of the other text teachers of a row, and there are none: the "
                f"panel has {len(self.text_teachers)} text teacher(s) and combine={self.combine!r}. Name a verifier, "
                "set accept: teacher to take whatever a teacher writes, or have several text teachers and "
                "combine='weighted_kl'."
            )
        if (self.text.min_teachers or 1) > len(self.text_teachers):
            raise ConfigError(
                f"min_teachers is {self.text.min_teachers}, and the panel has {len(self.text_teachers)} text teachers."
            )
        templates = Templates.load(self.text.templates)
        self.text.check()
        for name, teacher in self.text_teachers.items():
            if self.own[name] != OwnTerms():
                raise ConfigError(
                    f"Teacher {name!r} corrects by text, which has no divergence, temperature or estimator of its own. "
                    "Leave them out."
                )
            self.own[name] = OwnTerms(_BY_TEXT[1], 1.0, _BY_TEXT[0])
            adopt = getattr(teacher, "adopt_templates", None)
            if adopt is not None:
                adopt(templates)


def as_teacher(name: str, teacher: Any) -> Teacher:
    """Return ``teacher`` itself if it is one, else a :class:`LocalTeacher` over the model or path.

    Raises:
        ConfigError: it is none of these.
    """
    missing = missing_members(teacher)
    if not missing:
        return teacher  # type: ignore[no-any-return]
    if "score" not in missing:
        raise ConfigError(
            f"Teacher {name!r} is a {type(teacher).__name__}, which lacks {' and '.join(map(repr, missing))} of what a "
            "teacher has; see kd_plugin.teachers.Teacher."
        )
    if not isinstance(teacher, str | Path | nn.Module):
        raise ConfigError(
            f"Teacher {name!r} is a {type(teacher).__name__}; expected a path, a hub id, a loaded model or a Teacher."
        )
    return LocalTeacher(teacher, name=name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
