"""The lineage graph as one self-contained SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from kd_plugin.lineage.directory import printable
from kd_plugin.lineage.graph import SELF, Graph
from kd_plugin.lineage.verdict import NO_ADVICE

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 250, 58, 120, 22, 24
_FILL = {"model": "#e8f0fe", "dataset": "#e6f4ea", "teacher_outputs": "#fef7e0", "checkpoint": "#f3e8fd", SELF: "#fff"}


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
