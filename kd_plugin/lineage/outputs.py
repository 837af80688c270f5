"""The lineage of a teacher's outputs, which its cache carries to whoever trains on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kd_plugin.lineage.config import load_config
from kd_plugin.lineage.declared import match_datasets, match_teachers, registry_of, shipped_student
from kd_plugin.lineage.discovery import discover, with_weights
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Graph, Node
from kd_plugin.lineage.policy import evaluate
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.verdict import Finding, in_force, refuse


def outputs_record(
    teacher: Source,
    datasets: Sequence[Source] = (),
    config: Mapping[str, Any] | str | Path | None = None,
) -> dict[str, Any]:
    """Return the lineage that a teacher cache carries in its manifest: nodes and edges, sorted, JSON-ready.

    Args:
        teacher: who fills the cache.
        datasets: what the teacher is shown.
        config: the user's ``lineage`` field.

    Raises:
        LicenseRefusedError: the teacher's terms forbid training on its outputs, or nothing is known of them.
    """
    declared = load_config(config)
    registry = registry_of(declared)
    sources = [*match_teachers([teacher], declared), *match_datasets(datasets, declared)]
    behind = [with_weights(discover(one.source, registry, repo=one.repo), one.source) for one in sources]
    node = Node("teacher_outputs", f"outputs of {behind[0].node.label}")
    edges = []
    for one, found in zip(sources, behind, strict=True):
        kind: EdgeKind = "distilled_logits" if one.source.signal == "logits" else "trained_on_outputs"
        if one.source.kind == "dataset":
            kind = "trained_on"
        edges.append(Edge(node.id, found.node.id, kind, one.source.name))
    graph = Graph.of([node], edges).merged(*(found.graph for found in behind))
    # What is used is judged, not the cache: it is the user who says what is in it
    used = Graph.of([], [replace(edge, source=SELF) for edge in edges]).merged(*(found.graph for found in behind))
    overrides = tuple(sorted({*declared.overrides, *(o for found in behind for o in found.overrides)}))
    today = datetime.now(UTC).date().isoformat()
    date = declared.run.get("date") or today
    student = shipped_student(declared, registry)
    verdict = evaluate(used, registry.terms, declared.use, student, in_force(overrides, today), date)

    def remedy(finding: Finding) -> str:
        is_contract = finding.terms in registry.terms and registry.terms[finding.terms].kind == "service"
        if finding.code == "unknown_license" and finding.node == behind[0].node.id and not is_contract:
            name = teacher.name
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
