"""What was read of a source's licence, by name or by text, and which of several readings counts.

The nodes of a record are decided again from their own evidence: what a record says of the outcome counts for nothing.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from kd_plugin.lineage.graph import Evidence, Graph, Node
from kd_plugin.lineage.registry import UNKNOWN, UNREAD_API, Registry
from kd_plugin.lineage.sources import DECLARED, OWN, Voice, may_say_own

_RESEMBLES = 0.8  # share of three-word runs in common, above which a difference is worth naming
_SAME = 0.95  # above which a text is the licence, if what differs could not change what it asks
_COPYRIGHT = re.compile(r"^\W*(copyright\b|\(c\)|©)", re.IGNORECASE)
# One short sentence with one of these makes another licence of a known one.
_OPERATIVE = frozenset(
    """
    not no non must may shall only except unless cannot without permission commercial commercially noncommercial
    research academic military million prohibit prohibited forbid forbidden restrict restricted restriction revoke
    terminate train training distill distillation improve
    """.split()  # noqa: SIM905
)
ITS_NAME = "its name"  # where the name of a source contradicts what was read of it
IN_PROSE = "its card, in prose"  # sentences that name a closed model
IN_ROWS = "a column of its rows"  # generators of which nothing can be looked up
OWN_SERVER = "the server is the user's own"


@dataclass(frozen=True)
class Match:
    """What a licence text is.

    Attributes:
        id: registry entry, or None where nothing matches well enough.
        says: for people: the licence's name, or what it resembles and how it differs.
    """

    id: str | None
    says: str


def copyright_lines(text: str) -> tuple[str, ...]:
    """Return the lines that name a copyright holder: they must travel with the licence."""
    lines = (" ".join(line.split())[:300] for line in text.splitlines()[:400])
    named = (line.strip("*/# ") for line in lines if _COPYRIGHT.match(line) and re.search(r"\d{4}", line))
    return tuple(dict.fromkeys(named))[:50]


def recognise(text: str, registry: Registry) -> Match:
    """Compare a text with every text of the registry.

    Layout, case, punctuation and copyright lines do not count. A text that differs in little is the licence only if
    no word of what differs could change what it asks: "MIT, but not for commercial use" is not MIT.
    """
    words = _words(text)
    runs = _runs(words)
    total = runs.total()
    best, best_score = None, 0.0
    for terms_id in sorted(registry.terms):
        known = registry.text(terms_id)
        if known is None:
            continue
        if words == _words(known):
            return Match(terms_id, registry.terms[terms_id].name)
        other = _runs(_words(known))
        if 2 * min(total, other.total()) < _RESEMBLES * (total + other.total()):
            continue  # of such different lengths that they cannot resemble each other
        score = _share(runs, other)
        if score > best_score:
            best, best_score = terms_id, score
    if best is None or best_score < _RESEMBLES:
        return Match(None, "a text that no registry entry matches")
    differing = _differing(words, _words(registry.text(best) or ""))
    if best_score >= _SAME and not _OPERATIVE & set(differing) and _asks_the_same(text, best, registry):
        return Match(best, registry.terms[best].name)
    shown = " ".join(differing[:12])
    return Match(None, f"a text that resembles {registry.terms[best].name} and differs by: {shown}")


def _asks_the_same(text: str, terms_id: str, registry: Registry) -> bool:
    """Whether a text has the amounts of an entry's text, and in quotation marks what the entry says is to be shown."""
    reference = registry.text(terms_id) or ""
    shown = [clause.value for clause in registry.terms[terms_id].clauses if clause.value]
    kept = all(_quotes(text, value) for value in shown if _quotes(reference, value))
    return kept and _amounts(_words(text)) == _amounts(_words(reference))


def _quotes(text: str, value: str) -> bool:
    pattern = r"\s+".join(re.escape(word) for word in value.split())
    return re.search(rf"{pattern}\s*[\"\u201d\u2019']", text, re.IGNORECASE) is not None


def _amounts(words: tuple[str, ...]) -> Counter[tuple[str, str]]:
    return Counter(pair for pair in pairwise(words) if pair[1] in ("million", "billion"))


def _differing(mine: tuple[str, ...], reference: tuple[str, ...]) -> list[str]:
    matcher = difflib.SequenceMatcher(None, mine, reference, autojunk=len(mine) > 2000)
    changes = [op for op in matcher.get_opcodes() if op[0] != "equal"]
    return [word for _, i, j, k, m in changes for word in (*mine[i:j], *reference[k:m])]


def _share(mine: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    total = mine.total() + other.total()
    return 2 * (mine & other).total() / total if total else 0.0


@cache
def _runs(words: tuple[str, ...]) -> Counter[tuple[str, ...]]:
    return Counter(zip(words, words[1:], words[2:], strict=False))


@cache
def _words(text: str) -> tuple[str, ...]:
    lines = [line for line in text.splitlines() if not _COPYRIGHT.match(line)]
    return tuple(re.findall(r"[a-z0-9]+", " ".join(lines).lower()))


def read_licence(where: str, written: str, voice: Voice, registry: Registry, limit: int = 200) -> Evidence:
    """Resolve what was written, as far as whoever wrote it may say it; what is not understood is unknown.

    Args:
        where: what was read, as records name it.
        written: the words.
        voice: whose words they are.
        registry: licences.
        limit: characters of the words that are kept.
    """
    resolution = registry.resolve(written, voice)
    hint = f" ({resolution.hint.strip()})" if resolution.hint and voice == "user" else ""
    return Evidence(where, printable(written + hint, limit), resolution.ids, voice)


def decide(readings: Sequence[Evidence], registry: Registry) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
    """Choose the most severe reading; the user's word stands against readings that say nothing known.

    Returns:
        Registry ids that bind, none where nothing was read; and the readings, the chosen one first.
    """
    admitted = [r if may_say_own(r.voice or "stranger") or OWN not in r.ids else _unsaid(r) for r in readings]
    counted = [r for r in admitted if r.ids]
    known = [r for r in counted if UNKNOWN not in r.ids]
    doubts = [r for r in counted if r.where == ITS_NAME]
    candidates = doubts or (known if any(r.voice == "user" for r in known) else counted)
    if not candidates:
        return (), tuple(admitted)
    chosen = max(candidates, key=lambda r: (registry.severity(r.ids), r.where == DECLARED, r.where))
    return chosen.ids, (chosen, *(r for r in admitted if r is not chosen))


def _unsaid(reading: Evidence) -> Evidence:
    return replace(reading, ids=(UNKNOWN,))


def printable(text: str, limit: int = 200) -> str:
    """Return one line of printable characters; what comes from strangers ends in terminals and files."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def read_again(graph: Graph, registry: Registry) -> tuple[Graph, dict[str, str]]:
    """Return the graph with each node's terms as its evidence gives them, and the old node ids to the new ones.

    Args:
        graph: of a record.
        registry: licences and services; a node that names entries beyond it stays as it is.
    """
    makers: dict[str, list[Node]] = {}
    for edge in graph.edges:
        if edge.source in graph.nodes:
            makers.setdefault(edge.target, []).append(graph.nodes[edge.source])
    made = {edge.source for edge in graph.edges}
    new = {i: _reread(node, makers.get(i, []), i in made, registry) for i, node in graph.nodes.items()}
    if all(new[i] is node for i, node in graph.nodes.items()):
        return graph, {i: i for i in graph.nodes}
    ids = {i: node.id for i, node in new.items()}
    edges = [replace(e, source=ids.get(e.source, e.source), target=ids[e.target]) for e in graph.edges]
    return Graph.of(new.values(), edges), ids


def _reread(node: Node, makers: list[Node], has_sources: bool, registry: Registry) -> Node:
    named = {*node.licenses, *node.services, *(i for e in node.evidence for i in e.ids)}
    if not named <= registry.terms.keys():
        return node
    if node.kind in ("checkpoint", "teacher_outputs"):
        # Their terms are those of what they were made from; made from nothing, they are unknown
        return node if has_sources or node.licenses else replace(node, licenses=(UNKNOWN,))
    ids, _ = decide(node.evidence, registry)
    services = tuple(sorted({*node.services, *_services(node, registry)}))
    excused = node.undeclared and node.repo is None if node.kind == "dataset" else node.undeclared and _answered(makers)
    if not ids and not services and not excused:
        ids = (UNKNOWN,)
    return node if (ids, services) == (node.licenses, node.services) else replace(node, licenses=ids, services=services)


def _services(node: Node, registry: Registry) -> set[str]:
    """Return the services that a node's own names lead to, whatever it says of them."""
    found = {registry.service_of_model(name) for name in (node.model, node.repo) if name}
    if node.endpoint is not None:
        own = any(e.where == DECLARED and e.value == OWN_SERVER for e in node.evidence)
        lifted = own and not registry.is_listed(node.endpoint)
        found |= {s for s in registry.services_of_endpoint(node.endpoint) if s != UNREAD_API or not lifted}
    return {s for s in found if s is not None}


def _answered(makers: list[Node]) -> bool:
    """Whether the user's word for a model that was made from this one stands for it."""
    return any(maker.undeclared or any(e.where == DECLARED and e.ids for e in maker.evidence) for maker in makers)
