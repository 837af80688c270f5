"""The picture of a lineage: no edge runs through a box, no words overprint, whatever the graph; a page with terms."""

import random
import re
from xml.etree import ElementTree

import pytest

from kd_plugin.lineage.graph import SELF, Edge, Graph, Node
from kd_plugin.lineage.picture import EDGE_WORDS, graph_html, graph_mermaid, graph_svg

KINDS = ("model", "dataset", "teacher_outputs", "checkpoint")
EFFECTIVE = {"decision": "allow_with_duties", "license_expression": "MIT", "duties": [], "findings": []}


def record(nodes, edges, **effective):
    return {**Graph.of(nodes, edges).to_json(), "effective": {**EFFECTIVE, **effective}}


def chain(length):
    """Checkpoints of checkpoints; each was taught by a teacher that taught the first one too, on the same rows."""
    stages = [Node("checkpoint", f"stage-{i}", digest=f"{i:064x}") for i in range(length)]
    teacher, rows = Node("model", "teacher", licenses=("mit",)), Node("dataset", "rows", licenses=("cc-by-4.0",))
    edges = []
    for before, after in zip([SELF, *(s.id for s in stages)], [s.id for s in stages], strict=False):
        edges += [Edge(before, after, "initialized_from"), Edge(before, teacher.id, "distilled_logits")]
        edges += [Edge(before, rows.id, "trained_on")]
    return record([*stages, teacher, rows], edges)


def drawn_at_random(seed):
    generator = random.Random(seed)
    nodes = [Node(generator.choice(KINDS), f"node {i}", licenses=("mit",), digest=f"{i:064x}") for i in range(12)]
    ids = [SELF, *(node.id for node in nodes)]
    edges = [
        Edge(ids[i], ids[j], generator.choice(list(EDGE_WORDS)))
        for j in range(1, len(ids))
        for i in {generator.randrange(j), generator.randrange(j)}
    ]
    return record(nodes, edges)


def elements(drawn, tag, name):
    root = ElementTree.fromstring(drawn)
    return [e for e in root.iter() if e.tag.endswith(tag) and name in (e.get("class") or "").split()]


def points(path):
    """Points along a path of M, C and L."""
    found, here = [], (0.0, 0.0)
    for letter, rest in re.findall(r"([MCL])([^MCL]+)", path):
        n = [float(x) for x in rest.split()]
        if letter == "C":
            (x0, y0), (x1, y1), (x2, y2), (x3, y3) = here, n[0:2], n[2:4], n[4:6]
            for k in range(21):
                t = k / 20
                a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
                found.append((a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3))
        elif letter == "L":
            found += [(here[0] + (n[0] - here[0]) * k / 20, here[1] + (n[1] - here[1]) * k / 20) for k in range(21)]
        here = (n[-2], n[-1])
    return found


@pytest.mark.parametrize("drawn", [chain(2), chain(9), *map(drawn_at_random, range(12))])
def test_no_edge_runs_through_a_box_and_no_words_overprint(drawn):
    svg = graph_svg(drawn, "student")
    boxes = [
        tuple(float(e.get(key)) for key in ("x", "y", "width", "height"))
        for e in elements(svg, "rect", "b")
        if float(e.get("width")) > 20
    ]
    assert len(boxes) == len(drawn["nodes"]) + 1
    for x, y, width, height in boxes:
        for path in elements(svg, "path", "e"):
            within = [(a, b) for a, b in points(path.get("d")) if x + 1 < a < x + width - 1 and y < b < y + height]
            assert not within, (path.get("d"), (x, y))
    spots = [(float(e.get("x")), float(e.get("y")), 6.2 * len(e.text)) for e in elements(svg, "text", "w")]
    pairs = {(edge["from"], edge["to"]) for edge in drawn["edges"]}
    assert len(spots) == len(pairs)
    for i, (x, y, width) in enumerate(spots):
        assert not any(bx - 2 < x and x - width < bx + bw and by < y < by + bh for bx, by, bw, bh in boxes)
        for other_x, other_y, other in spots[i + 1 :]:
            assert abs(y - other_y) > 11 or x - width > other_x or other_x - other > x


def test_the_page_has_the_terms_at_each_node_and_asks_nobody():
    teacher = Node("model", "teacher", licenses=("mit",), repo="org/teacher", revision="abc")
    found = [
        {"severity": "block", "subject": "x", "node": teacher.id, "clause": "§ 1", "evidence": "", "remedy": "ask"}
    ]
    duty = {"path": [SELF, teacher.id], "terms": "mit", "cite": "§2", "says": "keep the notice", "basis": "explicit"}
    page = graph_html(record([teacher], [Edge(SELF, teacher.id, "distilled_logits")], findings=found,
                             duties=[{**duty, "status": "met"}]), "<b>student")  # fmt: skip
    for said in ("org/teacher @ abc", "keep the notice", "<b>block</b> § 1", "&lt;b&gt;student", "refused", "<svg"):
        assert said in page
    assert "<b>student" not in page and "<script" not in page and not re.search(r"(src|href)=", page)


def test_mermaid_names_each_node_and_edge():
    text = graph_mermaid(chain(2), "student")
    assert text.startswith("flowchart LR\n") and text.count("-->") == 6 and "taught by distributions" in text
