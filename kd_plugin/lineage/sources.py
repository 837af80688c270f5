"""How a run names what it learns from, before anything is loaded; and whose word a fact about it is.

There are three voices, and what each may say is decided here and nowhere else.

- ``registry``: what this package read itself.
- ``user``: the user's configuration, and what the user passes to a trainer or a teacher.
- ``stranger``: every file that lies beside weights or rows, and every answer of a server.

A stranger may name a licence that the registry knows. A stranger never says ``own``, never lifts a closed service, and
never replaces a text that was found. A record of an earlier run speaks for whoever wrote it: what it calls ``own`` is
its writer's, until the user declares the checkpoint or the cache as ``own`` too (see :func:`others_own`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kd_plugin.lineage.graph import Graph

Kind = Literal["model", "dataset", "teacher_outputs"]
Signal = Literal["logits", "text"]
Voice = Literal["registry", "user", "stranger"]
OWN = "own"  # the licence that only the user's own voice can name
DECLARED = "declared"  # where a reading comes from the user
KNOWN_REPOSITORY = "registry of known repositories"


@dataclass(frozen=True)
class RowFacts:
    """What rows, and the description that travels with them, say of themselves: a stranger's word.

    Attributes:
        named: distinct values of columns that name generators, each with its column.
        licenses: licences that the description names, each with where.
        words: the description.
    """

    named: tuple[tuple[str, str], ...] = ()
    licenses: tuple[tuple[str, str], ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Source:
    """A model, a dataset, or stored teacher outputs, as the user or another record declares it.

    Attributes:
        name: how this run calls it: ``student``, ``math``, the dataset's name.
        kind: what it is.
        ref: hub id or local directory; None for an endpoint.
        revision: branch, tag or commit, as asked for.
        license: declared licence: a hub id, an SPDX expression, or ``own``; None leaves it to discovery.
        endpoint: URL of a server, if the source is reached through one.
        endpoint_terms: ``own`` where the user declares that a server with a public name is the user's own.
        model: model name that is sent to the endpoint.
        signal: what reaches the student: distributions, or text only.
        generated_by: names of the models that wrote a dataset.
        generators: models that wrote a dataset and of which more than the name is declared.
        writers_declared: whether the user says who wrote a dataset, if only that no model did.
        named_in: the words that name this source, where only a card does.
        reason: why the declared licence holds although the source's name says otherwise, in the user's words.
        served: names that the server itself gives for what it serves.
        found_beside: whether ``ref`` was inferred from where the rows lie, so that finding nothing there means nothing.
        rows: what the rows of a dataset say of themselves, whatever its card says.
        record: a lineage node (and its ancestors) that the source brings along, such as a cache's manifest
            or a checkpoint's ``lineage.json``; None leaves it to discovery.
    """

    name: str
    kind: Kind = "model"
    ref: str | None = None
    revision: str | None = None
    license: str | None = None
    endpoint: str | None = None
    endpoint_terms: str | None = None
    model: str | None = None
    signal: Signal = "logits"
    generated_by: tuple[str, ...] = ()
    generators: tuple[Source, ...] = ()
    writers_declared: bool = False
    named_in: str | None = None
    reason: str | None = None
    served: tuple[str, ...] = ()
    rows: RowFacts | None = None
    found_beside: bool = False
    record: Mapping[str, Any] | None = field(default=None, compare=False)


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
