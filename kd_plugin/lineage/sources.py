"""What a run learns from, named before anything is loaded: whose word a fact is, and the clauses of its terms.

Three speak, each under the name that a record has in ``voice``; what each may say is decided here and nowhere else.

- ``registry``: what this package read itself.
- ``user``: the user's configuration, and what the user passes to a trainer or a teacher.
- ``stranger``: every file that lies beside weights or rows, and every answer of a server.

A stranger may name a license that the registry knows. A stranger never says ``own``, never lifts a closed service, and
never replaces a text that was found. A record of an earlier run speaks for whoever wrote it: what it calls ``own`` is
its writer's, until the user declares the checkpoint or the cache as ``own`` too (see :func:`others_own`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import rfc8785

from kd_plugin.errors import ConfigError, require_known_keys

if TYPE_CHECKING:
    from kd_plugin.lineage.graph import Graph


Kind = Literal["model", "dataset", "teacher_outputs"]
Signal = Literal["logits", "text"]
Voice = Literal["registry", "user", "stranger"]
OWN = "own"  # the licence that only the user can name
DECLARED = "declared"  # where a reading comes from the user
KNOWN_REPOSITORY = "registry of known repositories"
IN_MEMORY_MODEL = "model in memory"


@dataclass(frozen=True)
class RowFacts:
    """What rows, and the description that travels with them, say of themselves: a stranger's word.

    Attributes:
        named: distinct values of columns that name generators, each with its column.
        licenses: licences that the description names, each with where.
        words: the description.
    """

    named: tuple[tuple[str, str], ...] = ()
    licenses: tuple[tuple[str, str], ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Source:
    """A model, a dataset, or stored teacher outputs, as the user or another record declares it.

    Attributes:
        name: how this run calls it: ``student``, ``math``, the dataset's name.
        kind: what it is.
        ref: hub id or local directory; None for an endpoint.
        revision: branch, tag or commit, as asked for.
        license: declared licence: a hub id, an SPDX expression, or ``own``; None leaves it to discovery.
        endpoint: URL of a server, if the source is reached through one.
        endpoint_terms: ``own`` where the user declares that a server with a public name is the user's own.
        model: model name that is sent to the endpoint.
        signal: what reaches the student: distributions, or text only.
        generated_by: names of the models that wrote a dataset.
        generators: models that wrote a dataset and of which more than the name is declared.
        writers_declared: whether the user says who wrote a dataset, if only that no model did.
        named_in: the words that name this source, where only a card does.
        reason: why the declared licence holds although the source's name says otherwise, in the user's words.
        served: names that the server itself gives for what it serves.
        found_beside: whether ``ref`` was inferred from where the rows lie, so that finding nothing there means nothing.
        rows: what the rows of a dataset say of themselves, whatever its card says.
        is_student: whether this teacher is the student itself, for which the student's declarations speak too.
        record: a lineage node (and its ancestors) that the source brings along, such as a cache's manifest
            or a checkpoint's ``lineage.json``; None leaves it to discovery.
    """

    name: str
    kind: Kind = "model"
    ref: str | None = None
    revision: str | None = None
    license: str | None = None
    endpoint: str | None = None
    endpoint_terms: str | None = None
    model: str | None = None
    signal: Signal = "logits"
    generated_by: tuple[str, ...] = ()
    generators: tuple[Source, ...] = ()
    writers_declared: bool = False
    named_in: str | None = None
    reason: str | None = None
    served: tuple[str, ...] = ()
    rows: RowFacts | None = None
    found_beside: bool = False
    is_student: bool = False
    record: Mapping[str, Any] | None = field(default=None, compare=False)


def implied_voice(where: str) -> Voice:
    """Return whose word a reading is by where it was read: what records of earlier versions leave out."""
    return "user" if where == DECLARED else "registry" if where == KNOWN_REPOSITORY else "stranger"


def may_say_own(voice: Voice) -> bool:
    """Whether ``own`` is a license where this one says it, and not merely a word."""
    return voice == "user"


def others_own(graph: Graph) -> set[str]:
    """Return the nodes that are ``own`` by a record's word alone, and not by the user's.

    Records come with checkpoints and caches. What lies behind one is its writer's word, unless the user declared that
    checkpoint or cache as ``own``. An earlier checkpoint of the same run is no other's word.
    """
    outgoing: dict[str, list[tuple[str, str]]] = {}
    for edge in graph.edges:
        outgoing.setdefault(edge.source, []).append((edge.target, edge.kind))
    spoken_for, frontier = {"self"}, ["self"]
    while frontier:
        for target, kind in outgoing.get(frontier.pop(), []):
            if target in spoken_for:
                continue
            node = graph.nodes[target]
            spoken_for.add(target)
            is_record = node.kind in ("checkpoint", "teacher_outputs") and kind != "resumed_from"
            if not is_record or any(e.voice == "user" and OWN in e.ids for e in node.evidence):
                frontier.append(target)
    return {i for i, node in graph.nodes.items() if OWN in node.licenses and i not in spoken_for}


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


def captured_views(outputs: Sequence[Source]) -> dict[str, Any]:
    """Return how the teachers of caches read the rows, by the name of the cache, where they had a view."""
    records = {one.name: (one.record or {}).get("outputs") for one in outputs}
    views = {name: said.get("view") for name, said in records.items() if isinstance(said, Mapping)}
    return {name: dict(view) for name, view in views.items() if isinstance(view, Mapping)}
