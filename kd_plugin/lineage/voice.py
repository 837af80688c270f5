"""Whose word a fact is. There are three voices, and what each may say is decided here and nowhere else.

- ``registry``: what this package read itself.
- ``user``: the user's configuration, and what the user passes to a trainer or a teacher.
- ``stranger``: every file that lies beside weights or rows, and every answer of a server.

A stranger may name a licence that the registry knows. A stranger never says ``own``, never lifts a closed service, and
never replaces a text that was found. A record of an earlier run speaks for whoever wrote it: what it calls ``own`` is
its writer's, until the user declares the checkpoint or the cache as ``own`` too (see :func:`others_own`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kd_plugin.lineage.graph import Graph

Voice = Literal["registry", "user", "stranger"]
OWN = "own"  # the licence that only the user's own voice can name
DECLARED = "declared"  # where a reading comes from the user
KNOWN_REPOSITORY = "registry of known repositories"


def implied_voice(where: str) -> Voice:
    """Return whose word a reading is by where it was read: what records of earlier versions leave out."""
    return "user" if where == DECLARED else "registry" if where == KNOWN_REPOSITORY else "stranger"


def may_say_own(voice: Voice) -> bool:
    """Whether ``own`` is a licence in this voice, and not merely a word."""
    return voice == "user"


def others_own(graph: Graph) -> set[str]:
    """Return the nodes that are ``own`` by a record's word alone, and not by the user's.

    Records come with checkpoints and caches. What lies behind one is its writer's word, unless the user declared that
    checkpoint or cache as ``own``. An earlier checkpoint of the same run is no other's word.
    """
    outgoing: dict[str, list[tuple[str, str]]] = {}
    for edge in graph.edges:
        outgoing.setdefault(edge.source, []).append((edge.target, edge.kind))
    spoken_for, frontier = {"self"}, ["self"]
    while frontier:
        for target, kind in outgoing.get(frontier.pop(), []):
            if target in spoken_for:
                continue
            node = graph.nodes[target]
            spoken_for.add(target)
            is_record = node.kind in ("checkpoint", "teacher_outputs") and kind != "resumed_from"
            if not is_record or any(e.voice == "user" and OWN in e.ids for e in node.evidence):
                frontier.append(target)
    return {i for i, node in graph.nodes.items() if OWN in node.licenses and i not in spoken_for}
