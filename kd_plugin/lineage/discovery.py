"""Finding the terms of a source: from its directory, its card, a parent's record, or the user's declaration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage import hashing
from kd_plugin.lineage.config import parse_yaml
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Evidence, Graph, Node
from kd_plugin.lineage.record import RECORD, load_record
from kd_plugin.lineage.registry import UNKNOWN, Registry
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.texts import copyright_lines, recognise

_MAX_TEXT = 1 << 20  # a licence text or a card that is larger is not read
_LICENSE_FILE = re.compile(r"^(licen[cs]e|copying)([-_. ].*)?$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


@dataclass(frozen=True)
class Found:
    """A source's node and all that lies behind it.

    Attributes:
        node: the source itself.
        graph: ``node`` and its ancestors.
    """

    node: Node
    graph: Graph


def discover(source: Source, registry: Registry, *, digests: bool = False) -> Found:
    """Find what a source is and under which terms it stands. Reads files only; loads no model.

    Args:
        source: what the run or the user declares.
        registry: licences and services.
        digests: also hash the weights of a local model that has no commit.

    Raises:
        LineageError: a parent's record is damaged.
    """
    if source.kind == "teacher_outputs" or (source.record is not None and "nodes" in source.record):
        return _from_record(source)
    directory = _directory(source)
    if directory is not None and (directory / RECORD).is_file():
        return _from_checkpoint(directory, source)
    readings = [*_declared(source, registry)]
    facts = _DirectoryFacts()
    if directory is not None:
        facts = _read_directory(directory, registry)
        readings += facts.readings
    ids, ordered = _decide(readings, registry)
    services = _services(source, registry)
    undeclared = source.kind == "dataset" and not ids and source.ref is None
    if not ids and not undeclared and not services:
        ids = (UNKNOWN,)
    repo, revision = _identity(source, directory)
    node = Node(
        kind="dataset" if source.kind == "dataset" else "model",
        name=_name(source, directory),
        repo=repo,
        revision=revision,
        licenses=ids,
        services=services,
        evidence=ordered,
        expression=" AND ".join(sorted(s for i in ids if (s := registry.terms[i].spdx))) or None,
        text_sha256=facts.text_sha256,
        endpoint=_host(source.endpoint),
        model=source.model,
        copyright=facts.copyright,
        notice=facts.notice,
        texts={i: facts.texts[i] for i in ids if i in facts.texts and registry.text(i) is None},
        weights=_weights(directory) if digests and directory is not None and not revision else {},
        undeclared=undeclared,
    )
    graph = Graph.of([node], [])
    for base, kind in facts.bases:
        behind = discover(Source(base, "model", base), registry)
        graph = graph.merged(behind.graph, Graph.of([], [Edge(node.id, behind.node.id, kind)]))
    for name in source.generated_by:
        behind = discover(_generator(name), registry)
        edge = Edge(node.id, behind.node.id, "trained_on_outputs")
        graph = graph.merged(behind.graph, Graph.of([], [edge]))
    return Found(node, graph)


@dataclass
class _DirectoryFacts:
    readings: tuple[Evidence, ...] = ()
    text_sha256: str | None = None
    copyright: tuple[str, ...] = ()
    notice: str | None = None
    texts: Mapping[str, str] = None  # type: ignore[assignment]
    bases: tuple[tuple[str, EdgeKind], ...] = ()

    def __post_init__(self) -> None:
        self.texts = self.texts or {}


def _read_directory(directory: Path, registry: Registry) -> _DirectoryFacts:
    """Read the licence files, the card's front matter and the adapter's base of a model directory."""
    facts = _DirectoryFacts()
    readings: list[Evidence] = []
    copyrights: list[str] = []
    texts: list[str] = []
    for path in sorted(directory.iterdir()):
        if _LICENSE_FILE.match(path.name) and path.is_file():
            text = _read_text(path)
            if text is None:
                continue
            found = recognise(text, registry)
            seen = registry.terms[found].name if found else "a text that no registry entry matches"
            readings.append(Evidence(path.name, seen, (found or UNKNOWN,)))
            copyrights += copyright_lines(text)
            texts.append(text)
            facts.texts = {**facts.texts, (found or UNKNOWN): text}
    card = _front_matter(directory / "README.md")
    bases: list[tuple[str, EdgeKind]] = []
    written = card.get("license")
    if isinstance(written, str | list):
        for one in [written] if isinstance(written, str) else [w for w in written if isinstance(w, str)]:
            named = card.get("license_name") if one.lower() == "other" else None
            value = str(named) if isinstance(named, str) else one
            readings.append(Evidence("README.md", value[:100], registry.resolve(value).ids))
    declared_bases = card.get("base_model")
    for base in [declared_bases] if isinstance(declared_bases, str) else declared_bases or []:
        if isinstance(base, str) and _HUB_ID.match(base):
            bases.append((base, "initialized_from"))
    adapter = _json(directory / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(adapter, str) and adapter:
        bases = [(adapter, "adapter_of")]
    notice = next((directory / n for n in ("NOTICE", "NOTICE.txt", "Notice") if (directory / n).is_file()), None)
    facts.readings = tuple(readings)
    facts.copyright = tuple(dict.fromkeys(copyrights))
    facts.text_sha256 = hashing.sha256_text("\n".join(texts)) if texts else None
    facts.notice = _read_text(notice) if notice else None
    facts.bases = tuple(dict.fromkeys(bases))
    return facts


def _declared(source: Source, registry: Registry) -> list[Evidence]:
    if source.license is None:
        return []
    resolution = registry.resolve(source.license)
    return [Evidence("declared", f"{source.license}{resolution.hint}"[:200], resolution.ids)]


def _decide(readings: list[Evidence], registry: Registry) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
    """Choose the most severe reading. A declaration stands against a text that nothing recognises."""
    readings = [r for r in readings if r.ids]
    named = [r for r in readings if r.ids != (UNKNOWN,)]
    candidates = named if any(r.where == "declared" for r in named) else readings
    if not candidates:
        return (), tuple(readings)
    chosen = max(candidates, key=lambda r: (registry.severity(r.ids), r.where == "declared", r.where))
    return chosen.ids, (chosen, *(r for r in readings if r is not chosen))


def _services(source: Source, registry: Registry) -> tuple[str, ...]:
    """Return the closed APIs that a source is, by its endpoint's host or by its model's name."""
    found = {registry.service_of_endpoint(source.endpoint)} if source.endpoint else set()
    for name in (source.model, source.ref, source.name if source.ref is None else None):
        if name and _directory(replace(source, ref=name)) is None:
            found.add(registry.service_of_model(name))
    return tuple(sorted(s for s in found if s))


def _generator(name: str) -> Source:
    return Source(name, "model", name, signal="text")


def _directory(source: Source) -> Path | None:
    """Return the local directory of a source: its own, or the hub's cached snapshot."""
    if source.ref is None:
        return None
    path = Path(source.ref)
    if path.is_dir():
        return path
    if source.kind != "model" or not _HUB_ID.match(source.ref):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("README.md", "config.json", "adapter_config.json"):
        try:
            cached = try_to_load_from_cache(source.ref, name, revision=source.revision)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _identity(source: Source, directory: Path | None) -> tuple[str | None, str | None]:
    """Return hub id and revision, where the source has them; a cached snapshot's folder is its commit."""
    snapshot = _SNAPSHOT.search(directory.absolute().as_posix()) if directory is not None else None
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}", snapshot[3]
    if source.ref is None or Path(source.ref).is_dir():
        return None, source.revision
    return source.ref, source.revision


def _name(source: Source, directory: Path | None) -> str:
    if source.model:
        return source.model
    if source.ref is None or directory is None:
        return source.ref or source.name
    return directory.resolve().name if Path(source.ref).is_dir() else source.ref


def _host(endpoint: str | None) -> str | None:
    """Keep the host only: a URL may hold credentials."""
    if endpoint is None:
        return None
    from urllib.parse import urlsplit

    return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname


def _weights(directory: Path) -> dict[str, str]:
    return {subject.path: subject.sha256 for subject in hashing.subjects(directory)}


def _from_record(source: Source) -> Found:
    """Use the lineage that a cache or another record brings along."""
    if source.record is None:
        node = Node("teacher_outputs", source.name, licenses=(UNKNOWN,))
        return Found(node, Graph.of([node], []))
    graph = Graph.from_json(source.record)
    node = graph.root("teacher_outputs")
    return Found(node, graph)


def _from_checkpoint(directory: Path, source: Source) -> Found:
    """Use a parent checkpoint's own record: its ancestors are the child's ancestors."""
    record = load_record(directory)
    node = Node(
        kind="checkpoint",
        name=_name(source, directory),
        digest=record["digest"],
        details={"run_id": record["run"]["id"], "step": record["checkpoint"]["step"]},
    )
    graph = Graph.from_json(record)
    if not any(edge.source == SELF for edge in graph.edges):
        raise LineageError(f"{directory / RECORD} names nothing that its checkpoint was made from.")
    return Found(node, graph.rooted_at(node))


def _front_matter(path: Path) -> Mapping[str, Any]:
    """Read a card's YAML front matter; what cannot be read says nothing, and then other readings decide."""
    text = _read_text(path) if path.is_file() else None
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", text or "", re.DOTALL)
    if match is None:
        return {}
    try:
        data = parse_yaml(match[1].encode(), path.name)
    except ConfigError:
        return {"license": "unreadable front matter"}
    return data if isinstance(data, Mapping) else {}


def _json(path: Path) -> Mapping[str, Any]:
    text = _read_text(path) if path.is_file() else None
    try:
        data = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise LineageError(f"{path.name} in {path.parent.name!r} is not valid JSON: {error}.") from error
    return data if isinstance(data, Mapping) else {}


def _read_text(path: Path) -> str | None:
    """Read a text of at most 1 MiB, or None: nobody's licence is longer."""
    with path.open("rb") as file:
        raw = file.read(_MAX_TEXT + 1)
    return None if len(raw) > _MAX_TEXT else raw.decode("utf-8", "replace")
