"""What a registry entry says: clauses with reach and trigger."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import rfc8785

from kd_plugin.errors import ConfigError, require_known_keys

Trigger = Literal["training", "distribution"]
Effect = Literal["duty", "forbid", "unknown"]
REACHES = ("weights", "logits", "outputs", "data")


@dataclass(frozen=True)
class Clause:
    """One clause of a licence or of terms of service.

    Attributes:
        cite: where it stands: ``"§1.b.i"``.
        effect: it obliges (``duty``), forbids (``forbid``), or nothing is known (``unknown``).
        kind: what is owed or forbidden, a word for machines: ``notice``, ``name_prefix``, ``competing_model``.
        says: one sentence for people.
        reach: paths on which it binds by its words.
        precaution: paths on which its words do not clearly bind, and careful people keep it all the same.
        trigger: what makes it bite.
        fact: name of the declared fact that it turns on; it bites when the fact is true.
        value: what the duty asks for literally: a name prefix, a sentence to show.
        unless_student: licences of the student's own initialisation under which the clause does not apply.
        unless_repo: hub ids to which the clause does not apply: text-only models of a licence with a rule for others.
    """

    cite: str
    effect: Effect
    kind: str
    says: str
    reach: tuple[str, ...]
    precaution: tuple[str, ...] = ()
    trigger: Trigger = "distribution"
    fact: str | None = None
    value: str | None = None
    unless_student: tuple[str, ...] = ()
    unless_repo: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> Clause:
        """Read a clause from TOML or JSON; ``where`` names it in errors (ConfigError)."""
        require_known_keys(data, sorted(cls.__dataclass_fields__), where)
        values = _values(data, ("reach", "precaution", "unless_student", "unless_repo"), where)
        try:
            clause = cls(**values)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}.") from error
        for reach in (*clause.reach, *clause.precaution):
            if reach not in REACHES:
                raise ConfigError(f"{where}: unknown reach {reach!r}; expected one of {', '.join(REACHES)}.")
        if clause.effect not in ("duty", "forbid", "unknown") or clause.trigger not in ("training", "distribution"):
            raise ConfigError(
                f"{where}: effect {clause.effect!r} and trigger {clause.trigger!r}; expected duty, forbid or unknown, "
                "and training or distribution."
            )
        return clause

    def to_json(self) -> dict[str, Any]:
        """Return the clause without its empty fields."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in (None, ())}


@dataclass(frozen=True)
class Terms:
    """A licence, or a provider's terms of service.

    Attributes:
        id: hub licence id where there is one, else a short name of ours.
        kind: ``license`` travels with an artefact; ``service`` is a contract with whoever used an API.
        name: full name.
        clauses: what it asks.
        spdx: SPDX id or LicenseRef, or None for a service.
        url: where the words stand.
        read: when they were read (ISO date), with ``quoted`` where only others' quotations could be read.
        source: where the shipped text was taken from.
        text: file name of the shipped text, or None when none can be shipped.
        text_sha256: digest of that text.
        attachments: further shipped texts that belong to it (acceptable-use policies).
        inherits: reaches by which a student becomes a derivative, so that the licence is the student's too.
        notice_line: sentence that a NOTICE must carry, verbatim.
    """

    id: str
    kind: Literal["license", "service"]
    name: str
    clauses: tuple[Clause, ...] = ()
    spdx: str | None = None
    url: str = ""
    read: str = ""
    source: str = ""
    text: str | None = None
    text_sha256: str | None = None
    attachments: Mapping[str, str] = field(default_factory=dict)
    inherits: tuple[str, ...] = ("weights",)
    notice_line: str | None = None

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> Terms:
        """Read an entry from TOML or from a record; ``where`` names it in errors (ConfigError)."""
        require_known_keys(data, sorted(cls.__dataclass_fields__), where)
        plain = {k: v for k, v in data.items() if k not in ("clauses", "attachments")}
        values = _values(plain, ("inherits",), where)
        attachments = data.get("attachments", {})
        if not isinstance(attachments, Mapping) or not all(isinstance(v, str) for v in attachments.values()):
            raise ConfigError(f"{where}: attachments must be a table of file names, got {attachments!r}.")
        values["attachments"] = dict(attachments)
        clauses = data.get("clauses", [])
        if not isinstance(clauses, list) or not all(isinstance(c, Mapping) for c in clauses):
            raise ConfigError(f"{where}: clauses must be a list of tables.")
        try:
            return cls(clauses=tuple(Clause.from_mapping(c, where) for c in clauses), **values)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}.") from error

    @property
    def digest(self) -> str:
        """Sha256 of the entry: what a recorded exception is bound to, so that changed terms void it."""
        return hashlib.sha256(rfc8785.dumps(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a record embeds it, so that a verdict can be recomputed without this package."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "clauses"}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in (None, "", {})}
        return {**plain, "clauses": [clause.to_json() for clause in self.clauses]}


def _values(data: Mapping[str, Any], lists: tuple[str, ...], where: str) -> dict[str, Any]:
    """Check that every value is a string, or a list of strings where one is expected."""
    values: dict[str, Any] = {}
    for key, value in data.items():
        many = key in lists
        if many != isinstance(value, list) or not all(isinstance(v, str) for v in (value if many else [value])):
            expected = "a list of strings" if many else "a string"
            raise ConfigError(f"{where}: {key} must be {expected}, got {value!r}.")
        values[key] = tuple(value) if many else value
    return values
