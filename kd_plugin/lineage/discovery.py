"""Finding the terms of a source: from its directory, its card, a parent's record, or the user's declaration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage import hashing
from kd_plugin.lineage.directory import DirectoryFacts, printable, read_directory
from kd_plugin.lineage.endpoints import host_of
from kd_plugin.lineage.graph import DECLARED, SELF, Edge, Evidence, Graph, Node
from kd_plugin.lineage.hub import ask_hub
from kd_plugin.lineage.overrides import Override, read_overrides
from kd_plugin.lineage.record import RECORD, SCHEMA, load_record
from kd_plugin.lineage.registry import UNKNOWN, UNREAD_API, Registry
from kd_plugin.lineage.sources import Source

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


def discover(
    source: Source,
    registry: Registry,
    *,
    repo: str | None = None,
    vouched: bool = False,
    seen: tuple[str, ...] = (),
) -> Found:
    """Find what a source is and under which terms it stands. Reads files only; loads no model.

    Args:
        source: what the run or the user declares.
        registry: licences and services.
        repo: hub id that the user declares for a source that is loaded from elsewhere.
        vouched: the user declared the terms of a model made from this one, and so answers for it where nothing
            is found here; that shows as a warning.
        seen: references that lead here, against loops.

    Raises:
        LineageError: a parent's record is damaged.
    """
    if source.kind == "teacher_outputs":
        return _from_outputs(source)
    if source.record is not None and source.record.get("schema") == SCHEMA:
        return _from_checkpoint(source.record, source.name)
    directory, hub = _directory(source), None
    if (directory is None or not (directory / "README.md").is_file()) and _is_hub_id(source.ref):
        hub = ask_hub(str(source.ref), source.revision, "dataset" if source.kind == "dataset" else "model")
        directory = hub.directory or directory
    if directory is not None and (directory / RECORD).is_file():
        return _from_checkpoint(load_record(directory), printable(directory.resolve().name))
    facts = DirectoryFacts() if directory is None else read_directory(directory, registry)
    found_repo, revision = _identity(source, directory)
    repo = found_repo or repo
    known = registry.known_repository(repo) if source.kind == "model" else None
    readings = [*_declared(source, registry), *facts.readings]
    if known is not None:
        readings.append(Evidence("registry of known repositories", known.license, (known.license,)))
    ids, evidence = _decide(readings, registry)
    if hub is not None and hub.problem is not None:
        evidence += (Evidence("hub", hub.problem, ()),)
    if source.named_in is not None:
        evidence += (Evidence("a dataset's card", printable(source.named_in), ()),)
    services, server = _services(source, registry, directory, repo)
    evidence += server
    in_memory = source.kind == "dataset" and source.ref is None
    undeclared = not ids and not services and (in_memory or vouched)
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
    graph = Graph.of([node], [])
    trail = (*seen, source.ref or "")
    vouch = any(e.where == DECLARED and e.ids != (UNKNOWN,) for e in evidence) or vouched
    bases = list(facts.bases)
    if known is not None and known.base is not None and known.base not in {base for base, _ in bases}:
        bases.append((known.base, "initialized_from"))
    behind = [(Source(base, "model", base), kind, vouch) for base, kind in bases]
    written_by = [*(Source(name, "model", name) for name in source.generated_by), *source.generators]
    if source.kind == "dataset":
        said = {one.ref for one in written_by}
        written_by += [Source(n, "model", n, named_in=words) for n, words in facts.writers if n not in said]
    behind += [(one, "trained_on_outputs", False) for one in written_by]
    overrides: tuple[Override, ...] = ()
    for one, kind, answered in behind:
        if one.ref in (*trail, repo) or len(trail) > _MAX_DEPTH:
            continue
        found = discover(one, registry, vouched=answered, seen=trail)
        graph = graph.merged(found.graph, Graph.of([], [Edge(node.id, found.node.id, kind)]))
        overrides += found.overrides
    return Found(node, graph, overrides)


def _declared(source: Source, registry: Registry) -> list[Evidence]:
    if source.license is None:
        return []
    resolution = registry.resolve(source.license)
    hint = f" ({resolution.hint.strip()})" if resolution.hint else ""
    return [Evidence(DECLARED, printable(source.license + hint), resolution.ids)]


def _decide(readings: list[Evidence], registry: Registry) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
    """Choose the most severe reading; a declaration stands against readings that say nothing known."""
    known = [r for r in readings if UNKNOWN not in r.ids]
    candidates = known if any(r.where == DECLARED for r in known) else readings
    if not candidates:
        return (), ()
    chosen = max(candidates, key=lambda r: (registry.severity(r.ids), r.where == DECLARED, r.where))
    return chosen.ids, (chosen, *(r for r in readings if r is not chosen))


def _expression(evidence: tuple[Evidence, ...], ids: tuple[str, ...], registry: Registry) -> str | None:
    """Return the SPDX expression as written where one was, such as a choice, else that of the entries."""
    written = registry.resolve(evidence[0].value).expression if evidence and evidence[0].ids else None
    return written or " AND ".join(sorted(s for i in ids if (s := registry.terms[i].spdx))) or None


def _unshipped_texts(ids: tuple[str, ...], facts: DirectoryFacts, registry: Registry) -> dict[str, str]:
    """Take a licence file that nothing recognises for the text of a licence whose text is not shipped."""
    text = facts.unmatched_text
    return {} if text is None else {i: text for i in ids if i != UNKNOWN and registry.text(i) is None}


def _services(
    source: Source, registry: Registry, directory: Path | None, declared_repo: str | None
) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
    """Return the APIs that a source is, by its endpoint's host or its model's name, and what the user says of it."""
    found = {registry.service_of_endpoint(source.endpoint)} if source.endpoint else set()
    evidence: tuple[Evidence, ...] = ()
    if source.endpoint_terms == "own" and UNREAD_API in found and not registry.is_listed(source.endpoint or ""):
        found.discard(UNREAD_API)
        evidence = (Evidence("declared", "the server is the user's own", ()),)
    names = (source.model, declared_repo, source.ref if directory is None else None)
    found |= {registry.service_of_model(name) for name in names if name}
    return tuple(sorted(s for s in found if s)), evidence


def _directory(source: Source) -> Path | None:
    """Return the local directory of a source: its own, or the hub's cached snapshot."""
    if source.ref is None:
        return None
    if Path(source.ref).is_dir():
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
    return ref is not None and _HUB_ID.match(ref) is not None and not Path(ref).is_dir()


def _identity(source: Source, directory: Path | None) -> tuple[str | None, str | None]:
    """Return hub id and revision, where the source has them; a cached snapshot's folder is its commit."""
    snapshot = _SNAPSHOT.search(directory.absolute().as_posix()) if directory is not None else None
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}", snapshot[3]
    if source.ref is None or Path(source.ref).is_dir() or not _HUB_ID.match(source.ref):
        return None, source.revision
    return source.ref, source.revision


def _name(source: Source, directory: Path | None) -> str:
    """Return a name without the path that led to it: where a user keeps files is nobody's business."""
    if source.ref is None:
        return printable(source.model or source.name)
    if _HUB_ID.match(source.ref) and not Path(source.ref).is_dir():
        return source.ref
    return printable((directory.resolve() if directory else PurePath(source.ref)).name or source.name)


def with_weights(found: Found, source: Source) -> Found:
    """Add the digests of a local model's weights, by which it is known where there is no commit.

    What was found before training stays: only the digests are new, so that the record rests on what the gate saw.
    """
    node = found.node
    if node.kind != "model" or node.revision or source.ref is None or not Path(source.ref).is_dir():
        return found
    weights = {subject.path: subject.sha256 for subject in hashing.subjects(Path(source.ref))}
    named = replace(node, weights=weights)
    nodes = [named, *(n for n in found.graph.nodes.values() if n.id != node.id)]
    edges = [replace(e, source=named.id) if e.source == node.id else e for e in found.graph.edges]
    return Found(named, Graph.of(nodes, edges), found.overrides)


def _from_outputs(source: Source) -> Found:
    """Use the lineage that a cache brings along; a cache without one is unknown."""
    if source.record is None:
        node = Node("teacher_outputs", printable(source.name), licenses=(UNKNOWN,))
        return Found(node, Graph.of([node], []))
    graph = Graph.from_json(source.record)
    bare = graph.root("teacher_outputs")
    outputs = source.record.get("outputs", {})
    if not isinstance(outputs, Mapping):
        raise LineageError(f"The record of {source.name!r} has 'outputs' {outputs!r}; expected a mapping.")
    details = {str(k): _recordable(v) for k, v in outputs.items() if k != "digest" and v is not None}
    node = replace(bare, digest=outputs.get("digest"), details=details)
    edges = [replace(e, source=node.id) if e.source == bare.id else e for e in graph.edges]
    nodes = [node, *(n for n in graph.nodes.values() if n.id != bare.id)]
    return Found(node, Graph.of(nodes, edges), record_overrides(source.record))


def _recordable(value: Any) -> Any:
    """Return a fact in the form that canonical JSON can hold: integers beyond 2^53 become text."""
    if isinstance(value, Mapping):
        return {str(key): _recordable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_recordable(item) for item in value]
    exact = value is None or isinstance(value, bool | str | float) or (isinstance(value, int) and abs(value) < 2**53)
    return value if exact else str(value)


def _from_checkpoint(record: Mapping[str, Any], name: str) -> Found:
    """Use a parent checkpoint's own record: its ancestors are the child's ancestors."""
    node = checkpoint_node(record, name)
    graph = Graph.from_json(record)
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
