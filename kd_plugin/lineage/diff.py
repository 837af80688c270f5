"""What changed between the lineage of two checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kd_plugin.lineage.directory import printable
from kd_plugin.lineage.graph import Graph


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List what differs, one line each, ``-`` for what only the first has and ``+`` for what only the second has.

    Weights, step and saving time differ between any two checkpoints; of these only the weight files' names count.
    """
    lines: list[str] = []
    for title, read in (
        ("decision", lambda r: [r["effective"]["decision"]]),
        ("licence", lambda r: [r["effective"]["license_expression"]]),
        ("run", lambda r: [f"{r['run']['id']} ({r['run']['method']}, {r['run']['date']})"]),
        ("policy", lambda r: [f"{r['policy']['version']} {r['policy']['sha256'][:12]}"]),
        ("declared fact", lambda r: [f"{k}: {str(v).lower()}" for k, v in r["policy"]["facts"].items()]),
        ("source", _sources),
        ("duty", lambda r: [f"{d['terms']} {d['cite']}: {d['says']} [{d['basis']}]" for d in r["effective"]["duties"]]),
        ("finding", lambda r: [f"{f['severity']} {f['subject']}: {f['clause']}" for f in r["effective"]["findings"]]),
        ("exception", lambda r: [f"{o['terms']} {o['cite']} until {o['expires']}" for o in r["overrides"]]),
        ("weight file", lambda r: [s["path"] for s in r["subjects"]]),
    ):
        lines += _changed(title, read(before), read(after))
    return lines


def _sources(record: Mapping[str, Any]) -> list[str]:
    graph = Graph.from_json(record)
    return [
        f"{edge.kind.replace('_', ' ')} {graph.nodes[edge.target].label}"
        f" [{', '.join((*graph.nodes[edge.target].licenses, *graph.nodes[edge.target].services))}]"
        for edge in graph.edges
    ]


def _changed(title: str, before: Iterable[str], after: Iterable[str]) -> list[str]:
    old, new = set(before), set(after)
    gone = [f"- {title}: {printable(line, 400)}" for line in sorted(old - new)]
    return gone + [f"+ {title}: {printable(line, 400)}" for line in sorted(new - old)]
