"""A record shown to people: as a tree in a terminal, as one self-contained SVG, and what changed between two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from xml.sax.saxutils import escape

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
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 250, 58, 120, 22, 24
_FILL = {"model": "#e8f0fe", "dataset": "#e6f4ea", "teacher_outputs": "#fef7e0", "checkpoint": "#f3e8fd", SELF: "#fff"}


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


def graph_svg(record: Mapping[str, Any], name: str) -> str:
    """Draw the checkpoint on the left and, column by column, what it was made from; no script, nothing fetched."""
    graph = Graph.from_json(record)
    columns = _columns(graph)
    place = {
        node_id: (_MARGIN + x * (_WIDTH + _GAP_X), _MARGIN + y * (_HEIGHT + _GAP_Y))
        for x, column in enumerate(columns)
        for y, node_id in enumerate(column)
    }
    width = 2 * _MARGIN + len(columns) * _WIDTH + (len(columns) - 1) * _GAP_X
    height = 2 * _MARGIN + max(map(len, columns)) * (_HEIGHT + _GAP_Y) + 20
    refused = {f["node"] for f in record["effective"]["findings"] if f["severity"] in ("block", "unknown", "violation")}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{_text(f'License lineage of {name}')}</title>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L10 5L0 10z" fill="#555"/></marker></defs>',
    ]
    for edge in graph.edges:
        if edge.source in place and edge.target in place:
            parts += _arrow(place[edge.source], place[edge.target], edge.kind.replace("_", " "))
    decision = str(record["effective"]["decision"]).replace("_", " ")
    for node_id, (x, y) in place.items():
        if node_id == SELF:
            lines, kind = [name, decision, str(record["effective"]["license_expression"])], SELF
        else:
            node = graph.nodes[node_id]
            terms = ", ".join((*node.licenses, *node.services)) or "by its own lineage"
            lines, kind = [node.label, node.kind.replace("_", " "), terms], node.kind
        stroke = "#c5221f" if node_id in refused else "#555"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{_FILL[kind]}" stroke="{stroke}"/>'
        )
        parts += [f'<text x="{x + 10}" y="{y + 17 + 16 * i}">{_text(line, 36)}</text>' for i, line in enumerate(lines)]
    parts.append(f'<text x="{_MARGIN}" y="{height - 10}" fill="#555">{_text(NO_ADVICE)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _columns(graph: Graph) -> list[list[str]]:
    """Return node ids by the length of their shortest path from the checkpoint."""
    columns, seen = [[SELF]], {SELF}
    while True:
        below = sorted({e.target for e in graph.edges if e.source in columns[-1]} - seen)
        if not below:
            return columns
        columns.append(below)
        seen |= set(below)


def _arrow(source: tuple[int, int], target: tuple[int, int], label: str) -> list[str]:
    x1, y1 = source[0] + _WIDTH, source[1] + _HEIGHT // 2
    x2, y2 = target[0], target[1] + _HEIGHT // 2
    if target[0] <= source[0]:
        x1, x2 = source[0] + _WIDTH // 2, target[0] + _WIDTH // 2
    middle = (x1 + x2) // 2
    return [
        f'<path d="M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}" fill="none" stroke="#555" '
        'marker-end="url(#arrow)"/>',
        f'<text x="{middle}" y="{y2 - 5}" text-anchor="middle" font-size="10" fill="#555">{_text(label)}</text>',
    ]


def _text(text: str, limit: int = 200) -> str:
    return escape(printable(text, limit))


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
