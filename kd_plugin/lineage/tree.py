"""A record as a tree for people in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from kd_plugin.lineage.directory import printable
from kd_plugin.lineage.graph import SELF, Graph, Node
from kd_plugin.lineage.verdict import NO_ADVICE

_EDGE_WORDS = {
    "initialized_from": "initialised from",
    "adapter_of": "adapter of",
    "resumed_from": "resumed from",
    "merged_from": "merged from",
    "distilled_logits": "taught by (distributions)",
    "trained_on_outputs": "taught by (text)",
    "corrected_by": "corrected by",
    "trained_on": "trained on",
}
_COLOURS = {
    "allow": "green", "allow_with_duties": "green", "conditional": "yellow", "unknown": "red", "block": "red",
    "overridden": "magenta", "warning": "yellow", "violation": "red",
    "met": "green", "attest": "yellow", "unmet": "red",
}  # fmt: skip


def record_tree(record: Mapping[str, Any], name: str) -> RenderableType:
    """Return who made the checkpoint, under which terms, and what is owed, as something that rich prints.

    Names come from strangers, so all text is plain: no markup is interpreted.
    """
    graph = Graph.from_json(record)
    run, effective = record["run"], record["effective"]
    root = Tree(Text.assemble((printable(name), "bold"), f"  step {record['checkpoint']['step']}, {run['method']}"))
    _grow(root, graph, SELF, set())
    about = Text(f"run       {printable(str(run['id']))}, {printable(str(run['date']))}")
    changes = [Text(f"changed   {printable(str(change))}") for change in run.get("changes", ())]
    return Group(root, Text(), about, *changes, verdict_lines(effective, graph))


def verdict_lines(effective: Mapping[str, Any], graph: Graph) -> RenderableType:
    """Return decision, findings and duties for people, with the sentence that this is no advice."""
    lines: list[RenderableType] = [
        Text.assemble("decision  ", _coloured(effective["decision"])),
        Text(f"licence   {effective['license_expression']}"),
    ]
    if effective["findings"]:
        lines.append(Text("\nfindings", style="bold"))
        for finding in effective["findings"]:
            about = f" {finding['subject']}: {finding['clause']} ({finding['evidence']})"
            lines.append(Text.assemble("  ", _coloured(finding["severity"]), about))
            lines.append(Text(f"    way out: {finding['remedy']}"))
    if effective["duties"]:
        lines.append(Text("\nduties of whoever ships it", style="bold"))
        for duty in effective["duties"]:
            by = " > ".join(_step(graph, node) for node in duty["path"][1:])
            about = f" {duty['terms']} {duty['cite']}: {duty['says']} [{duty['basis']}, by {by}]"
            lines.append(Text.assemble("  ", _coloured(duty["status"]), about))
    lines.append(Text(f"\n{NO_ADVICE}", style="italic"))
    return Group(*lines)


def _grow(tree: Tree, graph: Graph, node_id: str, shown: set[str]) -> None:
    """Add what ``node_id`` was made from; what is shown already is named again, not spelled out again."""
    for edge in graph.edges:
        if edge.source != node_id:
            continue
        node = graph.nodes[edge.target]
        role = f" ({printable(edge.role)})" if edge.role and edge.role != node.label else ""
        again = " (see above)" if edge.target in shown and node.kind != "dataset" else ""
        branch = tree.add(Text(f"{_EDGE_WORDS[edge.kind]}{role}: {_describe(node)}{again}"))
        if edge.target not in shown:
            shown.add(edge.target)
            _grow(branch, graph, edge.target, shown)


def _describe(node: Node) -> str:
    terms = ", ".join((*node.licenses, *node.services))
    if not terms:
        terms = "by its own lineage" if node.kind in ("checkpoint", "teacher_outputs") else "no terms declared"
    where = f", from {node.evidence[0].where}" if node.evidence else ""
    revision = f" @ {node.revision[:12]}" if node.revision else ""
    return f"{printable(node.label)}{revision} [{terms}{where}]"


def _step(graph: Graph, node_id: str) -> str:
    return printable(graph.nodes[node_id].label) if node_id in graph.nodes else node_id


def _coloured(word: str) -> tuple[str, str]:
    return word.replace("_", " "), _COLOURS.get(word, "")
