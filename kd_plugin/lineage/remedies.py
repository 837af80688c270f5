"""The way out of a finding, in the words of the run that it stops: which line of config cures it."""

from __future__ import annotations

from collections.abc import Sequence

from kd_plugin.lineage.discovery import Found
from kd_plugin.lineage.graph import Edge, Graph
from kd_plugin.lineage.registry import Registry
from kd_plugin.lineage.verdict import Finding


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
