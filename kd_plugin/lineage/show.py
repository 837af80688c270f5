"""A record shown to people: as a tree in a terminal, and what changed between two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from kd_plugin.lineage.directory import printable
from kd_plugin.lineage.graph import SELF, Graph, Node
from kd_plugin.lineage.picture import EDGE_WORDS, terms_of
from kd_plugin.lineage.verdict import NO_ADVICE

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
    views = [Text(f"view      {printable(_view_line(*one))}") for one in sorted(run.get("views", {}).items())]
    return Group(root, Text(), about, *changes, *views, verdict_lines(effective, graph))


def _view_line(teacher: str, view: Mapping[str, Any]) -> str:
    """Say what a teacher read beside the prompt: its texts by their sha256, and the columns of the rows."""
    texts = [f"{name} {str(view[name])[:12]}..." for name in ("system", "context", "template_file") if name in view]
    columns = ", ".join(map(str, view.get("columns", ()))) or "no further columns"
    named = f" of {', '.join(map(str, view['datasets']))}" if view.get("datasets") else ""
    return f"{teacher} read {', '.join([*texts, columns])}{named}; template {view.get('chat_template')}"


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
        branch = tree.add(Text(f"{EDGE_WORDS[edge.kind]}{role}: {_describe(node)}{again}"))
        if edge.target not in shown:
            shown.add(edge.target)
            _grow(branch, graph, edge.target, shown)


def _describe(node: Node) -> str:
    terms = terms_of(node)
    where = f", from {node.evidence[0].where}" if node.evidence else ""
    revision = f" @ {node.revision[:12]}" if node.revision else ""
    return f"{printable(node.label)}{revision} [{terms}{where}]"


def _step(graph: Graph, node_id: str) -> str:
    return printable(graph.nodes[node_id].label) if node_id in graph.nodes else node_id


def _coloured(word: str) -> tuple[str, str]:
    return word.replace("_", " "), _COLOURS.get(word, "")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List what differs, one line each, ``-`` for what only the first has and ``+`` for what only the second has.

    Weights, step and saving time differ between any two checkpoints; of these only the weight files' names count.
    """
    lines: list[str] = []
    for title, read in (
        ("decision", lambda r: [r["effective"]["decision"]]),
        ("licence", lambda r: [r["effective"]["license_expression"]]),
        ("run", lambda r: [f"{r['run']['id']} ({r['run']['method']}, {r['run']['date']})"]),
        ("policy", lambda r: [f"{r['policy']['version']} {r['policy']['sha256'][:12]}"]),
        ("declared fact", lambda r: [f"{k}: {str(v).lower()}" for k, v in r["policy"]["facts"].items()]),
        ("source", _sources),
        ("duty", lambda r: [f"{d['terms']} {d['cite']}: {d['says']} [{d['basis']}]" for d in r["effective"]["duties"]]),
        ("finding", lambda r: [f"{f['severity']} {f['subject']}: {f['clause']}" for f in r["effective"]["findings"]]),
        ("exception", lambda r: [f"{o['terms']} {o['cite']} until {o['expires']}" for o in r["overrides"]]),
        ("weight file", lambda r: [s["path"] for s in r["subjects"]]),
    ):
        lines += _changed(title, read(before), read(after))
    return lines


def _sources(record: Mapping[str, Any]) -> list[str]:
    graph = Graph.from_json(record)
    return [
        f"{edge.kind.replace('_', ' ')} {graph.nodes[edge.target].label}"
        f" [{', '.join((*graph.nodes[edge.target].licenses, *graph.nodes[edge.target].services))}]"
        for edge in graph.edges
    ]


def _changed(title: str, before: Iterable[str], after: Iterable[str]) -> list[str]:
    old, new = set(before), set(after)
    gone = [f"- {title}: {printable(line, 400)}" for line in sorted(old - new)]
    return gone + [f"+ {title}: {printable(line, 400)}" for line in sorted(new - old)]
