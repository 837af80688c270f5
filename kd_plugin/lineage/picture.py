"""The lineage as a picture: one self-contained SVG, one HTML page with the terms at each node, or Mermaid text.

networkx, which torch brings, says which node is in which column. The order within a column is by barycenters, with a
stand-in in every column that an edge passes, so that no edge runs through a box. These forty lines are ours because no
library that orders columns can be required here (November 2026). Graphviz is a program; igraph and OGDF are under the
GPL; grandalf is under the GPL or the EPL, with no release since January 2023; fast-sugiyama, under MIT, has wheels for
glibc 2.34 and newer alone, where torch's take 2.28, so that it would keep the package off older clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

from kd_plugin.lineage.directory import printable
from kd_plugin.lineage.graph import SELF, Graph, Node
from kd_plugin.lineage.verdict import NO_ADVICE

EDGE_WORDS = {
    "initialized_from": "initialised from",
    "adapter_of": "adapter of",
    "resumed_from": "resumed from",
    "merged_from": "merged from",
    "distilled_logits": "taught by (distributions)",
    "trained_on_outputs": "taught by (text)",
    "corrected_by": "corrected by",
    "trained_on": "trained on",
}
_KINDS = {SELF: "this checkpoint", "model": "model", "dataset": "dataset", "teacher_outputs": "teacher's outputs",
          "checkpoint": "earlier checkpoint"}  # fmt: skip
_WIDTH, _LINE, _PAD, _PORT = 254, 17, 10, 16  # of a box; height of a line; space around its text; between two edges
_GAP_X, _GAP_Y, _MARGIN, _SWEEPS = 172, 26, 24, 8
_READABLE = 0.57  # of its size a page shows it at least, and scrolls
_STYLE = """
.l{font:12px/1.4 system-ui,sans-serif;fill:#1f2328}.d{fill:#59636e}.b{stroke:#818b98;stroke-width:1}
.e{fill:none;stroke:#818b98;stroke-width:1.3}.a{fill:#818b98}.w{font-size:11px;fill:#59636e;stroke:#fff;stroke-width:4px;
paint-order:stroke}.self{fill:#fff}.model{fill:#ddf4ff}.dataset{fill:#dafbe1}.teacher_outputs{fill:#fff8c5}
.checkpoint{fill:#fbefff}.refused{stroke:#cf222e;stroke-width:2.5}.bg{fill:#fff}
@media (prefers-color-scheme:dark){.l{fill:#e6edf3}.d{fill:#9198a1}.b{stroke:#656c76}.e{stroke:#656c76}.a{fill:#656c76}
.w{fill:#9198a1;stroke:#0d1117}.self{fill:#0d1117}.model{fill:#0c2d4a}.dataset{fill:#0f2f1a}.teacher_outputs{fill:#3a2d05}
.checkpoint{fill:#2f1d46}.refused{stroke:#f85149}.bg{fill:#0d1117}}
"""


@dataclass(frozen=True)
class _Box:
    """Where a node, or the stand-in of an edge that passes, is drawn; a stand-in has no lines and no width."""

    x: float
    y: float
    height: float
    lines: tuple[str, ...] = ()


def graph_svg(record: Mapping[str, Any], name: str) -> str:
    """Draw the checkpoint on the left and, column by column, what it was made from; no script, nothing fetched.

    Args:
        record: the lineage.
        name: of the checkpoint.
    """
    graph = Graph.from_json(record)
    words = _words(graph)
    columns, chains = _columns(graph, words)
    boxes = _boxes(record, name, graph, columns, words)
    right = max(box.x for box in boxes.values()) + _WIDTH + _MARGIN
    bottom = max(box.y + box.height for box in boxes.values()) + _MARGIN
    refused = {f["node"] for f in record["effective"]["findings"] if f["severity"] in ("block", "unknown", "violation")}
    parts = [*_edges(boxes, chains, words)]
    for node_id, box in boxes.items():
        if box.lines:
            kind = SELF if node_id == SELF else graph.nodes[node_id].kind
            stroke = " refused" if node_id in refused else ""
            parts.append(
                f'<rect class="b {kind}{stroke}" x="{box.x:g}" y="{box.y:g}" width="{_WIDTH}" height="{box.height:g}" '
                'rx="6"/>'
            )
            for i, line in enumerate(box.lines):
                y = box.y + _PAD + 12 + i * _LINE
                said = _text(line, 35)
                weight = ' font-weight="600"' if i == 0 else ' fill-opacity="0.85"'
                parts.append(f'<text class="l" x="{box.x + _PAD:g}" y="{y:g}"{weight}>{said}</text>')
    legend, width = _legend(graph, bottom, bool(refused))
    right, bottom = max(right, width), bottom + 2 * _LINE + _MARGIN
    parts += [*legend, f'<text class="l d" x="{_MARGIN}" y="{bottom - _PAD:g}">{_text(NO_ADVICE)}</text>']
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right:g}" height="{bottom:g}" viewBox="0 0 {right:g} '
        f'{bottom:g}" role="img">',
        f"<title>{_text(f'License lineage of {name}')}</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto"><path class="a" d="M0 0L10 5L0 10z"/></marker></defs>',
        f'<rect class="bg" width="{right:g}" height="{bottom:g}"/>',
        *parts,
        "</svg>",
    ]) + "\n"  # fmt: skip


def graph_html(record: Mapping[str, Any], name: str) -> str:
    """Return one page with the picture, and for each node its terms, who says so, and the duties that it brings."""
    graph = Graph.from_json(record)
    effective = record["effective"]
    entries = []
    for node in graph.nodes.values():
        terms = terms_of(node)
        where = " @ ".join(one for one in (node.repo, node.revision) if one)
        said = "".join(f"<li>{_text(e.where)}: {_text(e.value)}</li>" for e in node.evidence)
        owed = [d for d in effective["duties"] if node.id in d["path"][-1:]]
        duties = "".join(
            f"<li><b>{_text(d['status'])}</b> {_text(d['terms'])} {_text(d['cite'])}: {_text(d['says'], 600)}</li>"
            for d in owed
        )
        found = "".join(
            f'<li class="bad"><b>{_text(f["severity"])}</b> {_text(f["clause"], 600)}: {_text(f["remedy"], 600)}</li>'
            for f in effective["findings"]
            if f["node"] == node.id
        )
        entries.append(
            f"<details open><summary><b>{_text(node.label)}</b> <span>{_KINDS[node.kind]}, {_text(terms)}</span>"
            f"</summary><p>{_text(where)}</p>"
            + "".join(
                f"<h3>{title}</h3><ul>{items}</ul>"
                for title, items in (("Who says so", said), ("Findings", found), ("Duties", duties))
                if items
            )
            + "</details>"
        )
    decision = str(effective["decision"]).replace("_", " ")
    picture = graph_svg(record, name)
    wide = float(picture.split('width="', 1)[1].split('"', 1)[0])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(f"License lineage of {name}")}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;margin:0;padding:16px;max-width:1200px;
margin-inline:auto;background:#fff;color:#1f2328}}.picture{{overflow-x:auto;border:1px solid #d1d9e0;border-radius:6px}}
.picture svg{{display:block;max-width:100%;min-width:var(--least);height:auto}}
details{{border:1px solid #d1d9e0;border-radius:6px;padding:8px 12px;margin:8px 0}}
summary{{cursor:pointer;overflow-wrap:anywhere}}summary span{{color:#59636e}}h1{{font-size:20px}}h2{{font-size:17px}}
h3{{font-size:14px;margin:8px 0 0}}p{{margin:4px 0;color:#59636e;overflow-wrap:anywhere}}
ul{{margin:4px 0;padding-left:20px}}
li{{overflow-wrap:anywhere}}.bad b{{color:#cf222e}}@media (prefers-color-scheme:dark){{body{{background:#0d1117;
color:#e6edf3}}.picture,details{{border-color:#3d444d}}summary span,p{{color:#9198a1}}.bad b{{color:#f85149}}}}</style>
</head><body><h1>License lineage of {_text(name)}</h1>
<p>Decision: <b>{_text(decision)}</b>. License: {_text(str(effective["license_expression"]))}. {_text(NO_ADVICE)}</p>
<div class="picture" style="--least:{_READABLE * wide:.0f}px">{picture}</div>
<h2>What it was made from</h2>{"".join(entries)}</body></html>
"""


def graph_mermaid(record: Mapping[str, Any], name: str) -> str:
    """Return the graph as Mermaid text, which model hubs and code forges draw."""
    graph = Graph.from_json(record)
    ids = {node_id: f"n{i}" for i, node_id in enumerate(graph.nodes)} | {SELF: "self"}

    def quoted(*lines: str) -> str:
        return '"' + "<br>".join(printable(line, 60).replace('"', "#quot;") for line in lines) + '"'

    lines = ["flowchart LR", f"  self[{quoted(name, str(record['effective']['decision']).replace('_', ' '))}]"]
    for node_id, node in graph.nodes.items():
        terms = terms_of(node)
        lines.append(f"  {ids[node_id]}[{quoted(node.label, _KINDS[node.kind], terms)}]")
    for (source, target), said in _words(graph).items():
        lines.append(f"  {ids[source]} -->|{', '.join(said)}| {ids[target]}".replace("(", "").replace(")", ""))
    return "\n".join(lines) + "\n"


def terms_of(node: Node) -> str:
    """Return the licenses and services of a node, or why it has none."""
    own = "by its own lineage" if node.kind in ("checkpoint", "teacher_outputs") else "no terms declared"
    return ", ".join((*node.licenses, *node.services)) or own


def _words(graph: Graph) -> dict[tuple[str, str], list[str]]:
    """Return what each pair of nodes is joined by; several edges between two nodes are drawn as one."""
    found: dict[tuple[str, str], list[str]] = {}
    for edge in graph.edges:
        if edge.source == SELF or edge.source in graph.nodes:
            found.setdefault((edge.source, edge.target), []).append(EDGE_WORDS[edge.kind])
    return {pair: list(dict.fromkeys(words)) for pair, words in found.items()}


def _columns(
    graph: Graph, words: Mapping[tuple[str, str], list[str]]
) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
    """Return the columns from the checkpoint on, in order, and for each edge what it passes, from source to target."""
    import networkx

    digraph = networkx.DiGraph(list(words))
    digraph.add_node(SELF)
    reached = digraph.subgraph({SELF, *networkx.descendants(digraph, SELF)})
    number = {node: i for i, node in enumerate([SELF, *graph.nodes])}
    columns = [sorted(column, key=number.__getitem__) for column in networkx.topological_generations(reached)]
    depth = {node: x for x, column in enumerate(columns) for node in column}
    chains = {}
    for source, target in words:
        if source in depth:
            passed = [f"{source}>{target}:{x}" for x in range(depth[source] + 1, depth[target])]
            for x, one in enumerate(passed, depth[source] + 1):
                columns[x].append(one)
            chains[source, target] = [source, *passed, target]
    beside: dict[str, list[list[str]]] = {}
    for chain in chains.values():
        for left, right in pairwise(chain):
            beside.setdefault(left, [[], []])[1].append(right)
            beside.setdefault(right, [[], []])[0].append(left)
    for sweep in range(_SWEEPS):
        side, order = (0, range(1, len(columns))) if sweep % 2 == 0 else (1, range(len(columns) - 2, -1, -1))
        for x in order:
            there = {node: i for i, node in enumerate(columns[x - 1 if side == 0 else x + 1])}
            here = {node: i for i, node in enumerate(columns[x])}

            def middle(
                node: str, there: dict[str, int] = there, here: dict[str, int] = here, side: int = side
            ) -> float:
                near = [there[one] for one in beside.get(node, [[], []])[side]]
                return sum(near) / len(near) if near else here[node]

            columns[x].sort(key=middle)
    return columns, chains


def _boxes(
    record: Mapping[str, Any],
    name: str,
    graph: Graph,
    columns: list[list[str]],
    words: Mapping[tuple[str, str], list[str]],
) -> dict[str, _Box]:
    """Return where each node and each stand-in is drawn; columns are centered on the tallest."""
    sized: list[list[tuple[str, float, tuple[str, ...]]]] = []
    for column in columns:
        one: list[tuple[str, float, tuple[str, ...]]] = []
        for node_id in column:
            if node_id == SELF:
                decision = str(record["effective"]["decision"]).replace("_", " ")
                lines: tuple[str, ...] = (name, decision, str(record["effective"]["license_expression"]))
            elif node_id in graph.nodes:
                node = graph.nodes[node_id]
                lines = (
                    node.label,
                    _KINDS[node.kind],
                    terms_of(node),
                )
            else:
                lines = ()
            arriving = sum(target == node_id for _, target in words)
            leaving = sum(source == node_id for source, _ in words)
            text = 2 * _PAD + len(lines) * _LINE if lines else _PORT
            one.append((node_id, max(text, (max(arriving, leaving) + 1) * _PORT if lines else 0), lines))
        sized.append(one)
    heights = [sum(height + _GAP_Y for _, height, _ in one) - _GAP_Y for one in sized]
    boxes = {}
    for x, (one, height) in enumerate(zip(sized, heights, strict=True)):
        y = _MARGIN + (max(heights) - height) / 2
        for node_id, own, lines in one:
            boxes[node_id] = _Box(_MARGIN + x * (_WIDTH + _GAP_X), y, own, lines)
            y += own + _GAP_Y
    return boxes


def _edges(
    boxes: Mapping[str, _Box],
    chains: Mapping[tuple[str, str], list[str]],
    words: Mapping[tuple[str, str], list[str]],
) -> Iterator[str]:
    """Draw each edge through its stand-ins; edges of a box leave and arrive at places of their own."""
    leaving: dict[str, list[tuple[float, tuple[str, str]]]] = {}
    arriving: dict[str, list[tuple[float, tuple[str, str]]]] = {}
    for pair, chain in chains.items():
        leaving.setdefault(pair[0], []).append((boxes[chain[1]].y, pair))
        arriving.setdefault(pair[1], []).append((boxes[chain[-2]].y, pair))
    ports: dict[tuple[str, tuple[str, str]], float] = {}
    for side, ends in (("out", leaving), ("in", arriving)):
        for node, found in ends.items():
            step = boxes[node].height / (len(found) + 1)
            for i, (_, pair) in enumerate(sorted(found), 1):
                ports[side, pair] = boxes[node].y + i * step
    labels = []
    for pair, chain in chains.items():
        points = [(boxes[chain[0]].x + _WIDTH, ports["out", pair])]
        for one in chain[1:-1]:
            middle = boxes[one].y + boxes[one].height / 2
            points += [(boxes[one].x, middle), (boxes[one].x + _WIDTH, middle)]
        points.append((boxes[chain[-1]].x, ports["in", pair]))
        path = f"M{points[0][0]:g} {points[0][1]:g}"
        for i, ((x1, y1), (x2, y2)) in enumerate(pairwise(points)):
            half = (x1 + x2) / 2
            path += f"L{x2:g} {y2:g}" if i % 2 else f"C{half:g} {y1:g} {half:g} {y2:g} {x2:g} {y2:g}"
        yield f'<path class="e" d="{path}" marker-end="url(#arrow)"/>'
        x, y = points[-1]
        said = _text(", ".join(words[pair]), 60)
        labels.append(f'<text class="l w" x="{x - 14:g}" y="{y - 4:g}" text-anchor="end">{said}</text>')
    yield from labels  # over all lines


def _legend(graph: Graph, top: float, refused: bool) -> tuple[list[str], float]:
    """Return what the colours mean, and how wide that is."""
    kinds = [SELF, *dict.fromkeys(node.kind for node in graph.nodes.values())]
    shown = [(kind, _KINDS[kind], "") for kind in kinds] + (
        [("self", "not allowed as it is", " refused")] if refused else []
    )
    parts, x = [], float(_MARGIN)
    for kind, said, more in shown:
        parts.append(f'<rect class="b {kind}{more}" x="{x:g}" y="{top:g}" width="14" height="14" rx="3"/>')
        parts.append(f'<text class="l d" x="{x + 20:g}" y="{top + 12:g}">{said}</text>')
        x += 40 + 7 * len(said)
    return parts, x


def _text(text: str, limit: int = 200) -> str:
    return escape(printable(text, limit))
