"""Finding the terms of a source: from its directory, its card, a parent's record, or the user's declaration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage import hashing
from kd_plugin.lineage.data import TEXT_RECORD, read_text_record
from kd_plugin.lineage.directory import DirectoryFacts, ask_hub, read_directory
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Evidence, Graph, Node
from kd_plugin.lineage.names import host_of
from kd_plugin.lineage.origins import prose_of, writers_in_columns
from kd_plugin.lineage.proof import Proofs
from kd_plugin.lineage.readings import (
    IN_PROSE,
    IN_ROWS,
    ITS_NAME,
    OWN_SERVER,
    decide,
    printable,
    read_again,
    read_licence,
)
from kd_plugin.lineage.record import RECORD, SCHEMA, is_directory, load_record
from kd_plugin.lineage.registry import UNKNOWN, UNREAD_API, Registry
from kd_plugin.lineage.sources import DECLARED, IN_MEMORY_MODEL, KNOWN_REPOSITORY, OWN, RowFacts, Source
from kd_plugin.lineage.verdict import Override, read_overrides

_MAX_DEPTH = 16  # bases of bases; deeper is a loop or a prank
_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_SNAPSHOT = re.compile(r"(?:models|datasets)--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


@dataclass(frozen=True)
class Found:
    """A source's node and all that lies behind it.

    Attributes:
        node: the source itself.
        graph: ``node`` and its ancestors.
        overrides: exceptions that the ancestors' records hold; they still hold for what is made from them.
    """

    node: Node
    graph: Graph
    overrides: tuple[Override, ...] = ()


@dataclass(frozen=True)
class Vouch:
    """The user's word for a model, which also stands for a base of it of which nothing is found.

    Attributes:
        ids: licences that the user declared.
        reason: why they hold although a name says otherwise.
    """

    ids: tuple[str, ...]
    reason: str | None = None


def discover(
    source: Source,
    registry: Registry,
    *,
    repo: str | None = None,
    vouch: Vouch | None = None,
    seen: tuple[str, ...] = (),
    proofs: Proofs | None = None,
) -> Found:
    """Find what a source is and under which terms it stands. Reads files only; loads no model.

    Args:
        source: what the run or the user declares.
        registry: licences and services.
        repo: hub id that the user declares for a source that is loaded from elsewhere.
        vouch: what the user declared of a model made from this one, and so answers for where nothing is found here;
            that shows as a warning.
        seen: references that lead here, against loops.
        proofs: compares records with the weights beside them.

    Raises:
        LineageError: a parent's record is damaged.
    """
    proofs = proofs or Proofs()
    if source.kind == "teacher_outputs":
        return _from_outputs(source, registry)
    if source.record is not None and source.record.get("schema") == SCHEMA:
        return _from_checkpoint(source.record, source, IN_MEMORY_MODEL, registry)
    directory, hub = _directory(source), None
    if (directory is None or not (directory / "README.md").is_file()) and _is_hub_id(source.ref):
        hub = ask_hub(str(source.ref), source.revision, "dataset" if source.kind == "dataset" else "model")
        directory = hub.directory or directory
    doubt: tuple[Evidence, ...] = ()
    if directory is not None and source.kind == "dataset":
        text, problem = read_text_record(directory)
        if text is not None:
            return _from_outputs(replace(source, name=printable(directory.resolve().name), record=text), registry)
        if problem is not None:
            doubt = (Evidence(TEXT_RECORD, f"not about these rows: {problem}", (UNKNOWN,)),)
    if directory is not None and (directory / RECORD).is_file():
        record = load_record(directory)
        problem = proofs.problem(directory, record, {} if hub is None else hub.weights)
        if problem is None:
            return _from_checkpoint(record, source, printable(directory.resolve().name), registry)
        doubt = (Evidence(RECORD, f"not about these weights: {problem}", (UNKNOWN,)),)
    facts = DirectoryFacts() if directory is None else read_directory(directory, registry)
    if facts.trace is not None and not doubt:
        doubt = (Evidence(facts.trace, f"says that a {RECORD} belongs to it, which is not here", (UNKNOWN,)),)
    found_repo, revision = _identity(source, directory)
    repo = found_repo or repo
    known = [one for name in (repo, source.model, *source.served) if (one := registry.known_repository(name))]
    readings = [*_declared(source, registry), *doubt, *facts.readings, *_stated_by_rows(source, registry)]
    if source.kind == "model":
        readings += [Evidence(KNOWN_REPOSITORY, one.license, (one.license,)) for one in dict.fromkeys(known)]
    ids, evidence = decide(readings, registry)
    services, server = _services(source, registry, directory, repo)
    bases = [one.base for one in known if one.base is not None]
    below = Graph.of([], [])
    edges: list[tuple[Node, EdgeKind]] = []
    overrides: tuple[Override, ...] = ()
    trail, mine = (*seen, source.ref or ""), _vouch(source, evidence, vouch)
    for parent, kind, answered in _behind(source, facts, bases, mine, registry):
        if parent.ref in (*trail, repo):
            continue
        if len(trail) > _MAX_DEPTH:
            evidence += (Evidence("its bases", f"more than {_MAX_DEPTH} models deep", (UNKNOWN,)),)
            ids, evidence = decide(evidence, registry)
            continue
        found = discover(parent, registry, vouch=answered, seen=trail, proofs=proofs)
        below, overrides = below.merged(found.graph), (*overrides, *found.overrides)
        edges.append((found.node, kind))
    if source.kind == "model" and not known:
        carried = {*(vouch.ids if vouch is not None and not ids else ids), *(i for n, _ in edges for i in n.licenses)}
        names = (repo, source.model, *source.served, source.ref if _is_hub_id(source.ref) else None)
        reason = source.reason or (vouch.reason if vouch is not None else None)
        evidence += _against_its_name(names, carried, reason, registry)
        ids, evidence = decide(evidence, registry)
    if hub is not None and hub.problem is not None:
        evidence += (Evidence("hub", hub.problem, ()),)
    if source.named_in is not None:
        evidence += (Evidence("a dataset's card", printable(source.named_in), ()),)
    if source.kind == "dataset":
        evidence += _questions(source, facts, registry)
    evidence += server
    in_memory = source.kind == "dataset" and (source.ref is None or source.found_beside)
    undeclared = not ids and not services and (in_memory or vouch is not None)
    if not ids and not services and not undeclared:
        ids = (UNKNOWN,)
    node = Node(
        kind="dataset" if source.kind == "dataset" else "model",
        name=_name(source, directory),
        repo=repo,
        revision=revision,
        licenses=ids,
        services=services,
        evidence=evidence,
        expression=_expression(evidence, ids, registry),
        text_sha256=facts.text_sha256,
        endpoint=host_of(source.endpoint or ""),
        model=None if source.model is None else printable(source.model),
        copyright=facts.copyright,
        notice=facts.notice,
        texts=_unshipped_texts(ids, facts, registry),
        undeclared=undeclared,
    )
    graph = below.merged(Graph.of([node], [Edge(node.id, target.id, kind) for target, kind in edges]))
    return Found(node, graph, overrides)


def _declared(source: Source, registry: Registry) -> list[Evidence]:
    return [] if source.license is None else [read_licence(DECLARED, source.license, "user", registry)]


def _stated_by_rows(source: Source, registry: Registry) -> list[Evidence]:
    stated = source.rows.licenses if source.rows is not None else ()
    return [read_licence(where, written, "stranger", registry, 100) for where, written in stated]


def _vouch(source: Source, evidence: tuple[Evidence, ...], given: Vouch | None) -> Vouch | None:
    """Return what the user answers for in the bases of a source: a licence that is declared and understood."""
    mine = next((e for e in evidence if e.where == DECLARED and e.ids != (UNKNOWN,)), None)
    return given if mine is None else Vouch(mine.ids, source.reason or (given.reason if given else None))


def _behind(
    source: Source, facts: DirectoryFacts, known_bases: Sequence[str], vouch: Vouch | None, registry: Registry
) -> list[tuple[Source, EdgeKind, Vouch | None]]:
    """List what a source was made from: its bases, and the models that wrote it."""
    bases = list(facts.bases)
    bases += [(base, "initialized_from") for base in known_bases if base not in {name for name, _ in bases}]
    if source.kind == "dataset":  # rows have no weights: a model that their card calls a base wrote them
        bases = [(base, "trained_on_outputs") for base, _ in bases]
    behind: list[tuple[Source, EdgeKind, Vouch | None]] = [
        (Source(base, "model", base), kind, vouch) for base, kind in dict.fromkeys(bases)
    ]
    rows = source.rows or RowFacts()
    written_by = [*(Source(name, "model", name) for name in source.generated_by), *source.generators]
    if source.kind == "dataset":
        named = [*facts.writers, *writers_in_columns(rows.named, registry)[0]]
        said = {one.ref for one in written_by}
        written_by += [Source(n, "model", n, named_in=words) for n, words in dict(named).items() if n not in said]
    return [*behind, *((one, "trained_on_outputs", None) for one in written_by)]


def _against_its_name(
    names: Sequence[str | None], carried: set[str], reason: str | None, registry: Registry
) -> tuple[Evidence, ...]:
    """Doubt a licence that the name of a source contradicts, until it is explained; a name alone decides nothing."""
    families = {i for name in names if name for i in registry.families_of(name)}
    if not families or not carried or carried & families or UNKNOWN in carried:
        return ()
    shown = " or ".join(sorted(families))
    if reason is not None:
        return (Evidence(ITS_NAME, f"names the family of {shown}; explained: {printable(reason)}", (), "user"),)
    said = (
        f"names the family of {shown}, and what was read is {' AND '.join(sorted(carried))}; declare the family's "
        "licence, or say why not: `reason: ...` beside `license`"
    )
    return (Evidence(ITS_NAME, said, (UNKNOWN,)),)


def _questions(source: Source, facts: DirectoryFacts, registry: Registry) -> tuple[Evidence, ...]:
    """Return what is asked about a dataset: prose that names closed models, and generators that no one can look up."""
    if source.writers_declared:
        return ()
    rows = source.rows or RowFacts()
    prose = dict.fromkeys([*facts.prose, *prose_of(rows.words, registry)])
    unread = writers_in_columns(rows.named, registry)[1]
    return (*(Evidence(IN_PROSE, words, ()) for words in prose), *(Evidence(IN_ROWS, words, ()) for words in unread))


def _expression(evidence: tuple[Evidence, ...], ids: tuple[str, ...], registry: Registry) -> str | None:
    """Return the SPDX expression as written where one was, such as a choice, else that of the entries."""
    first = evidence[0] if evidence and evidence[0].ids else None
    written = None if first is None else registry.resolve(first.value, first.voice or "stranger").expression
    return written or " AND ".join(sorted(s for i in ids if (s := registry.terms[i].spdx))) or None


def _unshipped_texts(ids: tuple[str, ...], facts: DirectoryFacts, registry: Registry) -> dict[str, str]:
    """Take a licence file that nothing recognises for the text of a licence whose text is not shipped."""
    text = facts.unmatched_text
    return {} if text is None else {i: text for i in ids if i != UNKNOWN and registry.text(i) is None}


def _services(
    source: Source, registry: Registry, directory: Path | None, declared_repo: str | None
) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
    """Return the APIs that a source is, by its endpoint's host or its model's name, and what the user says of it."""
    found: set[str | None] = set(registry.services_of_endpoint(source.endpoint)) if source.endpoint else set()
    evidence: tuple[Evidence, ...] = ()
    if source.served:
        evidence = (Evidence("server", f"it says that it serves {printable(', '.join(source.served))}", ()),)
    if source.endpoint_terms == "own" and UNREAD_API in found and not registry.is_listed(source.endpoint or ""):
        found.discard(UNREAD_API)
        evidence += (Evidence(DECLARED, OWN_SERVER, ()),)
    names = (source.model, *source.served, declared_repo, source.ref if directory is None else None)
    found |= {registry.service_of_model(name) for name in names if name}
    return tuple(sorted(s for s in found if s)), evidence


def _directory(source: Source) -> Path | None:
    """Return the local directory of a source: its own, or the hub's cached snapshot."""
    if source.ref is None:
        return None
    if is_directory(source.ref):
        return Path(source.ref)
    if not _HUB_ID.match(source.ref):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo_type: Literal["dataset", "model"] = "dataset" if source.kind == "dataset" else "model"
    for name in ("README.md", "config.json", "adapter_config.json", "LICENSE"):
        try:
            cached = try_to_load_from_cache(source.ref, name, revision=source.revision, repo_type=repo_type)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _is_hub_id(ref: str | None) -> bool:
    return ref is not None and _HUB_ID.match(ref) is not None and not is_directory(ref)


def _identity(source: Source, directory: Path | None) -> tuple[str | None, str | None]:
    """Return hub id and revision, where the source has them; a cached snapshot's folder is its commit."""
    snapshot = _SNAPSHOT.search(directory.absolute().as_posix()) if directory is not None else None
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}", snapshot[3]
    if source.ref is None or is_directory(source.ref) or not _HUB_ID.match(source.ref):
        return None, source.revision
    return source.ref, source.revision


def _name(source: Source, directory: Path | None) -> str:
    """Return a name without the path that led to it: where a user keeps files is nobody's business."""
    if source.ref is None:
        return printable(source.model or source.name)
    if _HUB_ID.match(source.ref) and not is_directory(source.ref):
        return source.ref
    return printable((directory.resolve() if directory else PurePath(source.ref)).name or source.name)


def with_weights(found: Found, source: Source) -> Found:
    """Add the digests of a local model's weights, by which it is known where there is no commit.

    What was found before training stays: only the digests are new, so that the record rests on what the gate saw.
    """
    node = found.node
    if node.kind != "model" or node.revision or source.ref is None or not is_directory(source.ref):
        return found
    weights = {subject.path: subject.sha256 for subject in hashing.subjects(Path(source.ref))}
    named = replace(node, weights=weights)
    nodes = [named, *(n for n in found.graph.nodes.values() if n.id != node.id)]
    edges = [replace(e, source=named.id) if e.source == node.id else e for e in found.graph.edges]
    return Found(named, Graph.of(nodes, edges), found.overrides)


def _from_outputs(source: Source, registry: Registry) -> Found:
    """Use the lineage that a cache brings along; a cache without one is unknown."""
    if source.record is None:
        node = Node("teacher_outputs", printable(source.name), licenses=(UNKNOWN,))
        return Found(node, Graph.of([node], []))
    read = Graph.from_json(source.record)
    bare = read.root("teacher_outputs")
    graph, ids = read_again(read, registry)
    outputs = source.record.get("outputs", {})
    if not isinstance(outputs, Mapping):
        raise LineageError(f"The record of {source.name!r} has 'outputs' {outputs!r}; expected a mapping.")
    details = {str(k): _recordable(v) for k, v in outputs.items() if k != "digest" and v is not None}
    before = graph.nodes[ids[bare.id]]
    said = replace(before, evidence=())  # what a record says of itself is no word of the user's
    node = replace(_vouched(said, source), digest=outputs.get("digest"), details=details)
    edges = [replace(e, source=node.id) if e.source == before.id else e for e in graph.edges]
    nodes = [node, *(n for n in graph.nodes.values() if n.id != before.id)]
    return Found(node, Graph.of(nodes, edges), record_overrides(source.record))


def _vouched(node: Node, source: Source) -> Node:
    """Add the user's word to a checkpoint or a cache that is declared as ``own``: then what it calls own is theirs."""
    if source.license is None or source.license.strip().lower() != OWN:
        return node
    return replace(node, evidence=(Evidence(DECLARED, OWN, (OWN,)), *node.evidence))


def _recordable(value: Any) -> Any:
    """Return a fact in the form that canonical JSON can hold: integers beyond 2^53 become text."""
    if isinstance(value, Mapping):
        return {str(key): _recordable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_recordable(item) for item in value]
    exact = value is None or isinstance(value, bool | str | float) or (isinstance(value, int) and abs(value) < 2**53)
    return value if exact else str(value)


def _from_checkpoint(record: Mapping[str, Any], source: Source, name: str, registry: Registry) -> Found:
    """Use a parent checkpoint's own record: its ancestors are the child's ancestors."""
    node = _vouched(checkpoint_node(record, name), source)
    graph, _ = read_again(Graph.from_json(record), registry)
    if not any(edge.source == SELF for edge in graph.edges):
        raise LineageError(f"The record of {name!r} names nothing that its checkpoint was made from.")
    return Found(node, graph.rooted_at(node), record_overrides(record))


def record_overrides(record: Mapping[str, Any]) -> tuple[Override, ...]:
    """Return the exceptions of a record; raises LineageError where they are malformed."""
    try:
        return read_overrides(record.get("overrides", []), "overrides")
    except (ConfigError, TypeError, AttributeError) as error:
        raise LineageError(f"The exceptions of a lineage record cannot be read: {error}") from error


def checkpoint_node(record: Mapping[str, Any], name: str) -> Node:
    """Return the node by which a child knows the checkpoint of ``record``."""
    details = {"run_id": record["run"]["id"], "step": record["checkpoint"]["step"]}
    return Node("checkpoint", name, digest=record["digest"], details=details)
