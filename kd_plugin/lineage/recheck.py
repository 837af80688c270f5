"""Judging the nodes of a record again from their own evidence: what it says of the outcome counts for nothing."""

from __future__ import annotations

from dataclasses import replace

from kd_plugin.lineage.graph import Graph, Node
from kd_plugin.lineage.readings import OWN_SERVER, decide
from kd_plugin.lineage.registry import UNKNOWN, UNREAD_API, Registry
from kd_plugin.lineage.voice import DECLARED


def judged_again(graph: Graph, registry: Registry) -> tuple[Graph, dict[str, str]]:
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
    new = {i: _judged(node, makers.get(i, []), i in made, registry) for i, node in graph.nodes.items()}
    if all(new[i] is node for i, node in graph.nodes.items()):
        return graph, {i: i for i in graph.nodes}
    ids = {i: node.id for i, node in new.items()}
    edges = [replace(e, source=ids.get(e.source, e.source), target=ids[e.target]) for e in graph.edges]
    return Graph.of(new.values(), edges), ids


def _judged(node: Node, makers: list[Node], has_sources: bool, registry: Registry) -> Node:
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
