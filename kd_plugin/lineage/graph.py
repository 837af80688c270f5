"""The lineage graph: what a checkpoint was made from, and how each thing reaches it.

An edge points from what was made to what it was made from. A path from the checkpoint to a node has a *reach*:
the way in which the node's terms touch the checkpoint. Initialisation passes a reach on unchanged; a cache or a
dataset passes on the reach of what filled it, so terms are not washed out by going through one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import rfc8785

from kd_plugin.errors import LineageError
from kd_plugin.lineage.sources import DECLARED, Voice, implied_voice

Reach = Literal["weights", "logits", "outputs", "data"]
EdgeKind = Literal[
    "initialized_from",
    "adapter_of",
    "resumed_from",
    "merged_from",
    "distilled_logits",
    "trained_on_outputs",
    "corrected_by",
    "trained_on",
]
NodeKind = Literal["model", "dataset", "teacher_outputs", "checkpoint"]

REACH: Mapping[str, Reach] = {
    "initialized_from": "weights",
    "adapter_of": "weights",
    "resumed_from": "weights",
    "merged_from": "weights",
    "distilled_logits": "logits",
    "trained_on_outputs": "outputs",
    "corrected_by": "outputs",
    "trained_on": "data",
}
# Of one record. A run that was resumed a thousand times stays below
_MAX_NODES, _MAX_EDGES, _MAX_LENGTH = 4096, 16_384, 1100
SELF = "self"  # the checkpoint that a graph describes


@dataclass(frozen=True)
class Evidence:
    """One reading of a node's licence.

    Attributes:
        where: what was read: ``lineage config``, ``LICENSE``, ``README.md`` ...
        value: what it said, as written there (shortened).
        ids: registry entries that it resolves to; none where it says something else than a licence.
        voice: whose word it is; None stands for what ``where`` implies.
    """

    where: str
    value: str
    ids: tuple[str, ...]
    voice: Voice | None = None

    def __post_init__(self) -> None:
        if self.voice is None:
            object.__setattr__(self, "voice", implied_voice(self.where))

    def to_json(self) -> dict[str, Any]:
        """Return the reading as it stands in a record, which leaves out the speaker that ``where`` implies."""
        said = {} if self.voice == implied_voice(self.where) else {"voice": self.voice}
        return {"where": self.where, "value": self.value, "ids": list(self.ids), **said}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """Read a reading back; raises KeyError, TypeError or ValueError where it is malformed."""
        voice = data.get("voice")
        if voice is not None and voice not in get_args(Voice):
            raise ValueError(f"unknown voice {voice!r}")
        if data.keys() - {"where", "value", "ids", "voice"}:
            raise ValueError(f"evidence that holds {sorted(data)}")
        return cls(str(data["where"]), str(data["value"]), _strings(data["ids"]), voice)


@dataclass(frozen=True)
class Node:
    """A model, a dataset, stored teacher outputs, or a checkpoint.

    Attributes:
        kind: what it is.
        name: short name for people.
        repo: hub id, where known.
        revision: commit or the revision asked for.
        licenses: registry ids that bind it, most severe reading first when sources disagree.
        services: ids of terms of service under which it was reached.
        evidence: every reading of its licence.
        expression: SPDX expression of ``licenses``.
        text_sha256: digest of the licence text found with it, or None.
        endpoint: host of the server it was reached through.
        model: model name sent to that server.
        copyright: copyright lines found with it.
        notice: NOTICE file found with it, verbatim.
        texts: licence texts that the registry does not ship, by id.
        weights: file name to sha256 of its weights, for a model without a commit.
        digest: digest of a checkpoint's record, or of stored outputs.
        undeclared: True where nothing was found of it and someone answers for it all the same: data that the user
            passed in memory, or the base of a model whose terms the user declared.
        details: facts about stored outputs (rows, tokens, sampling), or about a checkpoint (run, step).
    """

    kind: NodeKind
    name: str
    repo: str | None = None
    revision: str | None = None
    licenses: tuple[str, ...] = ()
    services: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    expression: str | None = None
    text_sha256: str | None = None
    endpoint: str | None = None
    model: str | None = None
    copyright: tuple[str, ...] = ()
    notice: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None
    undeclared: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Kind and the first 16 hex digits of the sha256 of the content: equal content is one node."""
        return f"{self.kind}:{hashlib.sha256(rfc8785.dumps(self._content())).hexdigest()[:16]}"

    @property
    def sure(self) -> str:
        """How sure the licence is, by what was read of it.

        ``text``: the licence's own words lie with it; ``declared``: the user said so; ``stated``: a card or the
        registry of known repositories says so; ``disputed``: readings differ, and the most severe counts;
        ``nothing``: nothing was read.
        """
        readings = {e.ids for e in self.evidence if e.ids} - {("unknown",)}
        if len(readings) != 1:
            return "disputed" if readings else "nothing"
        places = {e.where for e in self.evidence if e.ids}
        if any(re.match(r"(?i)licen[cs]e|copying|unlicense", place) for place in places):
            return "text"
        return "declared" if DECLARED in places else "stated"

    @property
    def label(self) -> str:
        """How messages call the node."""
        return self.repo or self.model or self.name

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"kind": self.kind, "name": self.name}
        for key in ("repo", "revision", "expression", "text_sha256", "endpoint", "model", "notice", "digest"):
            if getattr(self, key) is not None:
                content[key] = getattr(self, key)
        for key in ("licenses", "services", "copyright"):
            if getattr(self, key):
                content[key] = list(getattr(self, key))
        for key in ("texts", "weights", "details"):
            if getattr(self, key):
                content[key] = dict(getattr(self, key))
        if self.evidence:
            content["evidence"] = [e.to_json() for e in self.evidence]
        if self.undeclared:
            content["undeclared"] = True
        return content

    def to_json(self) -> dict[str, Any]:
        """Return the node as it stands in ``lineage.json``; fields without a value are left out."""
        return {"id": self.id, "sure": self.sure, **self._content()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Node:
        """Read a node back.

        Raises:
            LineageError: a field is missing, unknown or of the wrong type, or the id does not fit the content.
        """
        fields = dict(data)
        claimed, sure = fields.pop("id", None), fields.pop("sure", None)
        try:
            evidence = tuple(Evidence.from_json(e) for e in fields.pop("evidence", []))
            for key in ("licenses", "services", "copyright"):
                if key in fields:
                    fields[key] = _strings(fields[key])
            for key in ("texts", "weights", "details"):
                if not isinstance(fields.get(key, {}), Mapping):
                    raise TypeError(f"{key} is no mapping")
            for key in ("name", "repo", "revision", "expression", "endpoint", "model", "notice", "digest"):
                if not isinstance(fields.get(key), str | None):
                    raise TypeError(f"{key} is no string")
            node = cls(evidence=evidence, **fields)
            found = node.id
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise LineageError(f"A lineage node cannot be read: {error}. Seen: {str(dict(data))[:200]}") from error
        if node.kind not in get_args(NodeKind):
            raise LineageError(f"A lineage node has kind {node.kind!r}; expected one of {get_args(NodeKind)}.")
        if claimed != found:  # also catches values that are not what their field needs
            raise LineageError(f"Lineage node {claimed!r} does not fit its content (that is {found!r}); it was edited.")
        if sure not in (None, node.sure):  # a node of an older record does not say
            raise LineageError(f"Lineage node {claimed!r} says that it is {sure!r}; its evidence is {node.sure!r}.")
        return node


@dataclass(frozen=True, order=True)
class Edge:
    """``source`` was made from ``target``.

    Attributes:
        source: node id, or ``"self"`` for the checkpoint that the graph describes.
        target: node id.
        kind: how.
        role: what the run called the target: a teacher's name.
    """

    source: str
    target: str
    kind: EdgeKind
    role: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the edge as it stands in ``lineage.json``."""
        edge = {"from": self.source, "to": self.target, "kind": self.kind}
        return {**edge, "role": self.role} if self.role else edge

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Edge:
        """Read an edge back; raises LineageError where it is malformed."""
        values = {key: data.get(key) for key in ("from", "to", "kind")} | {"role": data.get("role", "")}
        known = data.keys() <= values.keys() and all(isinstance(v, str) for v in values.values())
        if not known or values["kind"] not in REACH:
            raise LineageError(f"A lineage edge cannot be read: {str(dict(data))[:200]}. Kinds: {', '.join(REACH)}.")
        return cls(values["from"], values["to"], values["kind"], values["role"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Path:
    """One way in which a node reaches the checkpoint.

    Attributes:
        reach: how the node's terms touch the checkpoint.
        remote: True when another model stands between, of which only the outputs were used: terms that bind
            derivatives of outputs reach through it, others do so only as a precaution.
        nodes: node ids from the checkpoint (``"self"``) to the node.
    """

    reach: Reach
    remote: bool
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes and edges, in canonical order."""

    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    @classmethod
    def of(cls, nodes: Iterable[Node], edges: Iterable[Edge]) -> Graph:
        """Build a graph; equal nodes and edges are merged, order does not matter."""
        found = {node.id: node for node in nodes}
        return cls(dict(sorted(found.items())), tuple(sorted(set(edges))))

    def merged(self, *others: Graph) -> Graph:
        """Return the union with ``others``."""
        graphs = (self, *others)
        return Graph.of((n for g in graphs for n in g.nodes.values()), (e for g in graphs for e in g.edges))

    def rooted_at(self, node: Node) -> Graph:
        """Return the graph with ``node`` in the place of ``self``: how a child embeds its parent's graph."""
        edges = [replace(e, source=node.id) if e.source == SELF else e for e in self.edges]
        return Graph.of([*self.nodes.values(), node], edges)

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return nodes and edges as they stand in ``lineage.json``, sorted."""
        return {"nodes": [n.to_json() for n in self.nodes.values()], "edges": [e.to_json() for e in self.edges]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graph:
        """Read a graph back.

        Raises:
            LineageError: malformed, or an edge names a node that is not there.
        """
        nodes, edges = data.get("nodes"), data.get("edges")
        if not isinstance(nodes, list) or not isinstance(edges, list):
            raise LineageError("A lineage record needs the lists 'nodes' and 'edges'.")
        if not all(isinstance(item, Mapping) for item in [*nodes, *edges]):
            raise LineageError("The nodes and edges of a lineage record must be mappings.")
        if len(nodes) > _MAX_NODES or len(edges) > _MAX_EDGES:
            raise LineageError(
                f"A lineage record has {len(nodes)} nodes and {len(edges)} edges; at most {_MAX_NODES} and "
                f"{_MAX_EDGES} are read."
            )
        graph = cls.of(map(Node.from_json, nodes), map(Edge.from_json, edges))
        if (len(graph.nodes), len(graph.edges)) != (len(nodes), len(edges)):
            raise LineageError("A lineage record says a node or an edge twice; it was edited.")
        for edge in graph.edges:
            if edge.source not in graph.nodes and edge.source != SELF:
                raise LineageError(f"A lineage edge names node {edge.source!r}, which the record does not hold.")
            if edge.target not in graph.nodes:  # nothing was made from the checkpoint that the record describes
                raise LineageError(f"A lineage edge leads to node {edge.target!r}, which the record does not hold.")
        return graph

    def root(self, kind: str) -> Node:
        """Return the one node of ``kind`` from which no other node was made."""
        targets = {edge.target for edge in self.edges}
        roots = [n for n in self.nodes.values() if n.kind == kind and n.id not in targets]
        if len(roots) != 1:
            raise LineageError(f"Expected one {kind} node that nothing was made from, found {len(roots)}.")
        return roots[0]

    def paths(self) -> dict[str, list[Path]]:
        """Return, for every node that reaches the checkpoint, its shortest path of each reach.

        Raises:
            LineageError: a node is farther away than any that a run leads to.
        """
        outgoing: dict[str, list[Edge]] = {}
        for edge in self.edges:
            outgoing.setdefault(edge.source, []).append(edge)
        found: dict[tuple[str, Reach | None, bool], tuple[str, ...]] = {(SELF, None, False): (SELF,)}
        frontier: Sequence[tuple[str, Reach | None, bool]] = [(SELF, None, False)]
        while frontier:
            reached: dict[tuple[str, Reach | None, bool], tuple[str, ...]] = {}
            for state in frontier:
                node_id, reach, remote = state
                for edge in outgoing.get(node_id, []):
                    follow = self._follow(node_id, reach, remote, REACH[edge.kind])
                    key, path = (edge.target, *follow), (*found[state], edge.target)
                    if len(path) > _MAX_LENGTH:
                        raise LineageError(f"A lineage has more than {_MAX_LENGTH} steps from a source to its end.")
                    if key not in found and (key not in reached or path < reached[key]):
                        reached[key] = path
            found |= reached
            frontier = sorted(reached, key=lambda key: (reached[key], key[1] or "", key[2]))
        paths: dict[str, list[Path]] = {}
        for (node_id, reach, remote), nodes in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1] or "", item[0][2])
        ):
            if reach is not None:
                paths.setdefault(node_id, []).append(Path(reach, remote, nodes))
        return paths

    def _follow(self, node_id: str, reach: Reach | None, remote: bool, step: Reach) -> tuple[Reach, bool]:
        """Compose the reach of a path that ends in ``node_id`` with one more edge."""
        if reach is None or reach == "weights":
            return step, remote
        if step == "weights":
            return reach, remote
        # A cache or a dataset hands on what fills it; a model in between makes what lies behind it remote.
        through_model = self.nodes[node_id].kind in ("model", "checkpoint")
        return step, remote or through_model


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"expected a list of strings, got {values!r}")
    return tuple(values)
