"""Joining what a run, or a capture, has with what the user declares of it.

A finding names the line of config that cures it. The lineage of a teacher's outputs is carried by its cache to whoever
trains on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, nearest
from kd_plugin.lineage.config import Declaration, LineageConfig, load_config
from kd_plugin.lineage.data import CACHE, IN_MEMORY
from kd_plugin.lineage.discovery import Found, discover, with_weights
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Graph, Node
from kd_plugin.lineage.policy import evaluate
from kd_plugin.lineage.registry import UNKNOWN, Registry, default_registry, load_registry
from kd_plugin.lineage.sources import OWN, Source
from kd_plugin.lineage.verdict import Finding, Student, in_force, refuse


def registry_of(config: LineageConfig) -> Registry:
    """Return the package's registry, with the user's own on top where one is declared."""
    return default_registry() if config.registry is None else load_registry(config.registry)


@dataclass(frozen=True)
class Declared:
    """A source with what the user declares of it, and the hub id that the user declares, if any."""

    source: Source
    repo: str | None = None

    @classmethod
    def of(cls, source: Source, declaration: Declaration) -> Declared:
        """Join a source with what is declared of it."""
        return cls(declaration.applied_to(source), declaration.repo)


def shipped_student(config: LineageConfig, registry: Registry) -> Student:
    """Return what the user says of the checkpoint.

    Raises:
        ConfigError: the licence under which it would be shipped is not known.
    """
    written = config.student.declared_license
    if written is None:
        return Student(config.student.name)
    resolution = registry.resolve(written, "user")
    if UNKNOWN in resolution.ids:
        raise ConfigError(
            f"lineage.student.declared_license is {written!r}, which the registry does not know.{resolution.hint} "
            "Expected a hub licence id, an SPDX expression, or 'own'."
        )
    return Student(config.student.name, resolution.ids)


def match_outputs(outputs: Sequence[Source], config: LineageConfig) -> tuple[list[Source], frozenset[tuple[str, str]]]:
    """Join declarations of teachers and datasets to the caches that hold their outputs.

    Returns:
        The caches, as ``own`` where the user declares all that their record calls so; and the kind and name of what
        is so declared, which is no further teacher or dataset of the run.

    Raises:
        LineageError: a cache's record is malformed.
    """
    says_own = {("model", name) for name, d in config.teachers.items() if d.license == OWN}
    says_own |= {("dataset", n) for d in config.datasets if d.license == OWN for n in (d.repo, d.name) if n is not None}
    matched, answered = [], set()
    for source in outputs:
        called = _called_own(source.record) if source.record is not None else set()
        answered |= called & says_own
        matched.append(replace(source, license=OWN) if called and called <= says_own else source)
    return matched, frozenset(answered)


def _called_own(record: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Name, by kind and name, the teachers and datasets of a cache's record that its writer calls own."""
    graph = Graph.from_json(record)
    made = [(edge, graph.nodes[edge.target]) for edge in graph.edges if edge.source in graph.nodes]
    return {
        (node.kind, edge.role or node.name)
        for edge, node in made
        if graph.nodes[edge.source].kind == "teacher_outputs"
        and node.kind in ("model", "dataset")
        and OWN in node.licenses
    }


def match_teachers(
    teachers: Sequence[Source], config: LineageConfig, answered: Collection[tuple[str, str]] = ()
) -> list[Declared]:
    """Join declarations to teachers by name; without any teacher, the declared ones are the teachers.

    Args:
        teachers: of the run.
        config: the declarations.
        answered: what speaks of a cache's sources, as :func:`match_outputs` returns it.
    """
    known = [t.name for t in teachers]
    declared = {name: d for name, d in config.teachers.items() if ("model", name) not in answered}
    if not teachers:
        return [Declared.of(Source(name), declaration) for name, declaration in sorted(declared.items())]
    for name in declared:
        if name not in known:
            raise ConfigError(
                f"lineage.teachers names {name!r}, which is no teacher of this run; its teachers are "
                f"{', '.join(map(repr, known))}.{nearest(name, known)}"
            )
    return [
        Declared.of(t, config.teachers.get(t.name, config.student if t.is_student else Declaration())) for t in teachers
    ]


def match_datasets(
    datasets: Sequence[Source], config: LineageConfig, answered: Collection[tuple[str, str]] = ()
) -> list[Declared]:
    """Join declarations to datasets by name or hub id; the others are datasets of their own.

    Args:
        datasets: of the run.
        config: the declarations.
        answered: what speaks of a cache's sources, as :func:`match_outputs` returns it.
    """
    left = list(config.datasets)
    matched, in_memory = [], []
    for source in datasets:
        mine = next((d for d in left if {d.repo, d.name} & {source.name, source.ref} - {None}), None)
        if mine is not None:
            left.remove(mine)
        elif source.ref is None:
            in_memory.append(source)
            continue
        matched.append(Declared.of(source, mine or Declaration()))
    left = [d for d in left if not {("dataset", d.repo), ("dataset", d.name)} & {*answered}]
    for source in [one for one in in_memory if one.rows is not None]:  # what they say of themselves counts as well
        mine = left.pop(0) if left else Declaration()
        matched.append(Declared.of(replace(source, name=mine.name or mine.repo or source.name), mine))
    names = [d.name or d.repo or f"dataset {i + 1}" for i, d in enumerate(left)]
    extra = [Source(name, "dataset", signal="text") for name in names]
    spoken_for = [Declared.of(source, d) for source, d in zip(extra, left, strict=True)]
    # Rows in memory have no name by which a declaration could find them: any that is left speaks for them
    bare = [] if spoken_for else [Declared(one) for one in in_memory if one.rows is None]
    return [*matched, *spoken_for, *bare]


def not_cached(datasets: Sequence[Source], outputs: Sequence[Source]) -> list[Source]:
    """Leave out the rows of a run's own caches, for which the caches' records speak.

    Args:
        datasets: as :func:`~kd_plugin.lineage.data.dataset_sources` names them.
        outputs: the run's caches.
    """
    own = {f"{CACHE}{(one.record or {}).get('outputs', {}).get('digest')}" for one in outputs}
    others = [one for one in datasets if one.name not in own]
    return [replace(one, name=IN_MEMORY) if one.name.startswith(CACHE) else one for one in others]


def remedy_of(finding: Finding, roots: Sequence[tuple[Edge, Found]], graph: Graph, registry: Registry) -> str:
    """Put the run's own name of a source into the line of config that cures an unknown licence.

    Args:
        finding: what stands in the way.
        roots: the run's sources, by the edge that leads to each.
        graph: the whole lineage.
        registry: tells licences from contracts.
    """
    edge = next((e for e, found in roots if finding.node in found.graph.nodes), None)
    if finding.code != "unknown_license" or edge is None or registry.terms[finding.terms].kind == "service":
        return finding.remedy
    if edge.kind == "initialized_from":
        line = "student: {license: apache-2.0}"
    elif edge.kind == "merged_from":
        line = f"student: {{merged_from: [{{repo: .../{edge.role}, license: apache-2.0}}]}}"
    elif edge.target in graph.nodes and graph.nodes[edge.target].kind == "teacher_outputs":
        return "capture these outputs again, with a kd-plugin that records who taught"
    elif edge.kind == "trained_on" and edge.target != finding.node:
        writer = f"{{model: {finding.subject}, license: apache-2.0}}"
        line = f"datasets: [{{repo: {edge.role}, generated_by: [{writer}]}}]"
    elif edge.kind == "trained_on":
        line = f"datasets: [{{repo: {edge.role}, license: cc-by-4.0}}]"
    else:
        line = f"teachers: {{{edge.role}: {{license: apache-2.0}}}}"
    return f"declare its licence, `own` if it is yours: `lineage: {{{line}}}`"


def outputs_record(
    teacher: Source | Sequence[Source],
    datasets: Sequence[Source] = (),
    config: Mapping[str, Any] | str | Path | LineageConfig | None = None,
) -> dict[str, Any]:
    """Return the lineage that a teacher cache carries in its manifest: nodes and edges, sorted, JSON-ready.

    Args:
        teacher: who fills the cache; several, where several write.
        datasets: what the teacher is shown.
        config: the user's ``lineage`` field.

    Raises:
        LicenseRefusedError: the teacher's terms forbid training on its outputs, or nothing is known of them.
    """
    declared = load_config(config)
    registry = registry_of(declared)
    teachers = [teacher] if isinstance(teacher, Source) else list(teacher)
    sources = [*match_teachers(teachers, declared), *match_datasets(datasets, declared)]
    behind = [with_weights(discover(one.source, registry, repo=one.repo), one.source) for one in sources]
    taught_by = {found.node.id: one.name for one, found in zip(teachers, behind, strict=False)}
    node = Node("teacher_outputs", f"outputs of {', '.join(found.node.label for found in behind[: len(teachers)])}")
    edges = []
    for one, found in zip(sources, behind, strict=True):
        kind: EdgeKind = "distilled_logits" if one.source.signal == "logits" else "trained_on_outputs"
        if one.source.kind == "dataset":
            kind = "trained_on"
        edges.append(Edge(node.id, found.node.id, kind, one.source.name))
    graph = Graph.of([node], edges).merged(*(found.graph for found in behind))
    # What is used is checked, not the cache: it is the user who says what is in it
    used = Graph.of([], [replace(edge, source=SELF) for edge in edges]).merged(*(found.graph for found in behind))
    overrides = tuple(sorted({*declared.overrides, *(o for found in behind for o in found.overrides)}))
    today = datetime.now(UTC).date().isoformat()
    date = declared.run.get("date") or today
    student = shipped_student(declared, registry)
    verdict = evaluate(used, registry.terms, declared.use, student, in_force(overrides, today), date)

    def remedy(finding: Finding) -> str:
        is_contract = finding.terms in registry.terms and registry.terms[finding.terms].kind == "service"
        if finding.code == "unknown_license" and finding.node in taught_by and not is_contract:
            name = taught_by[finding.node]
            return f"declare its licence, `own` if it is yours: `lineage: {{teachers: {{{name}: {{license: mit}}}}}}`"
        return finding.remedy

    refuse(verdict.refusals, "Capturing is refused by the terms of its sources", remedy)
    record: dict[str, Any] = graph.to_json()
    return {**record, "overrides": [o.to_json() for o in overrides]} if overrides else record


def joined_records(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the lineage of a cache that holds what several captures stored: all that taught and all that was shown.

    Args:
        first: record of a cache.
        others: further ones; their outputs become the first one's.

    Raises:
        LineageError: a record is malformed.
    """
    graph, overrides = Graph.from_json(first), list(first.get("overrides", ()))
    root = graph.root("teacher_outputs")
    for record in others:
        other = Graph.from_json(record)
        old = other.root("teacher_outputs").id
        nodes = [node for node in other.nodes.values() if node.id != old]
        graph = graph.merged(
            Graph.of(nodes, [replace(e, source=root.id) if e.source == old else e for e in other.edges])
        )
        overrides += [one for one in record.get("overrides", ()) if one not in overrides]
    joined: dict[str, Any] = graph.to_json()
    return {**joined, "overrides": overrides} if overrides else joined
