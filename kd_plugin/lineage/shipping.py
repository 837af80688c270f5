"""The files that travel beside a student: NOTICE, LICENSES/, and the lineage as a bill of materials.

The bill is CycloneDX 1.7, and SPDX 3.0.1 on request. Same record, same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kd_plugin.lineage.graph import SELF, Graph, Node
from kd_plugin.lineage.record import NOTICE_HEADER
from kd_plugin.lineage.registry import Registry
from kd_plugin.lineage.sources import Terms
from kd_plugin.lineage.verdict import NO_ADVICE, Duty, Finding, Verdict

# Both documents are put together here, and tests validate them with the two projects' own libraries. At run time those
# would not do: cyclonedx-python-lib (11.12) has no model cards, where CycloneDX names datasets and limits of use, and
# spdx-python-model (0.0.6) is a preview of bindings that are still to change.
CYCLONEDX = ("1.7", "1.6")  # the first is written; checkpoints that were saved with the other verify as before
_SPACE = uuid.UUID("6f1a3c1e-5a0e-4c53-9a3b-1d7c8f1f2b6d")  # namespace of this package's identifiers
_SPDX_CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
_AI_KINDS = ("model", "checkpoint")


def settle(verdict: Verdict, graph: Graph, terms: Mapping[str, Terms]) -> Verdict:
    """Set the status of the duties that NOTICE and LICENSES/ fulfil, and report the texts that are missing."""
    supplied = {i for node in graph.nodes.values() for i in node.texts}
    duties: list[Duty] = []
    findings = list(verdict.findings)
    for duty in verdict.obligations:
        if duty.kind in ("notice", "state_changes"):
            duty = replace(duty, status="met")
        elif duty.kind == "license_text":
            there = terms[duty.terms].text is not None or duty.terms in supplied
            duty = replace(duty, status="met" if there else "unmet")
            if not there:
                findings.append(_text_missing(duty, graph.nodes[duty.node], terms[duty.terms]))
        duties.append(duty)
    return replace(verdict, obligations=tuple(duties), findings=tuple(dict.fromkeys(findings)))


def license_files(graph: Graph, terms: Mapping[str, Terms], registry: Registry) -> dict[str, str]:
    """Return name and contents of every file of LICENSES/: verbatim texts, or a statement that one is missing."""
    files: dict[str, str] = {}
    for node_id in sorted(graph.paths()):
        node = graph.nodes[node_id]
        for terms_id in node.licenses:
            entry = terms[terms_id]
            text = node.texts.get(terms_id) or (registry.text(terms_id) if entry.text else None)
            if text is not None:
                known = files.get(f"{terms_id}.txt", "")
                files[f"{terms_id}.txt"] = text if not known or text in known else f"{known}\n\n{text}"
            elif any(clause.kind == "license_text" for clause in entry.clauses):
                files.setdefault(f"{terms_id}.txt", _statement(entry))
            for attachment in sorted(entry.attachments):
                files[f"{attachment}.txt"] = registry.attachment(entry.attachments[attachment])
    return dict(sorted(files.items()))


def notice_text(graph: Graph, terms: Mapping[str, Terms], verdict: Verdict) -> str:
    """Return the NOTICE: the sentences that licences ask for, upstream notices, and who made what."""
    lines = [NOTICE_HEADER, NO_ADVICE, "", "The weights in this directory were modified by training.", ""]
    for node_id in sorted(graph.paths(), key=lambda i: (graph.nodes[i].label, i)):
        node = graph.nodes[node_id]
        if node.kind == "checkpoint":
            continue
        lines.append(f"{_plain(node.label)} ({node.kind.replace('_', ' ')})")
        names = ", ".join(terms[i].name for i in (*node.licenses, *node.services)) or "no terms declared"
        lines.append(f"  terms: {names}")
        lines += [f"  {terms[i].notice_line}" for i in node.licenses if terms[i].notice_line]
        lines += [f"  {_plain(line)}" for line in node.copyright]
        if node.notice:
            lines += ["  its NOTICE, verbatim:", *(f"  | {line}" for line in node.notice.splitlines())]
        lines.append("")
    shown = sorted({d.value for d in verdict.obligations if d.kind == "display" and d.value})
    lines += [f"{value}" for value in shown]
    return "\n".join(lines).rstrip("\n") + "\n"


def _text_missing(duty: Duty, node: Node, entry: Terms) -> Finding:
    explicit = duty.basis == "explicit"
    return Finding(
        "text_missing", "violation" if explicit else "warning", "distribution", duty.node, node.label, duty.path,
        f"{entry.name}, {duty.cite}: {duty.says}", "no text of this licence is shipped with kd-plugin",
        f"text to be supplied: place it as LICENSE in the source's directory ({entry.url or 'from its provider'})",
    )  # fmt: skip


def _statement(entry: Terms) -> str:
    return (
        f'The text of "{entry.name}" could not be obtained when this checkpoint was written and is to be supplied.\n'
        f"Its canonical place: {entry.url or 'not known'}\n"
    )


def _plain(text: str) -> str:
    """Keep one line of printable characters: names come from strangers."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def bom_text(record: Mapping[str, Any], version: str = CYCLONEDX[0]) -> str:
    """Return the contents of ``bom.cdx.json`` in a version of :data:`CYCLONEDX`."""
    return json.dumps(cyclonedx(record, version), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def cyclonedx(record: Mapping[str, Any], version: str = CYCLONEDX[0]) -> dict[str, Any]:
    """Return a CycloneDX bill of materials of a record (its digest and saving time are not used)."""
    graph = Graph.from_json(record)
    name = str(record["student"].get("name") or "checkpoint")
    licence = record["effective"]["license_expression"]
    depends: dict[str, list[str]] = {SELF: [], **{node_id: [] for node_id in graph.nodes}}
    for edge in graph.edges:
        if edge.target not in depends[edge.source]:
            depends[edge.source].append(edge.target)
    data = [node_id for node_id, node in graph.nodes.items() if node.kind not in _AI_KINDS]
    subject: dict[str, Any] = {
        "bom-ref": SELF,
        "type": "machine-learning-model",
        "name": name,
        "version": str(record["checkpoint"]["step"]),
        **_licences(None if licence == "NONE" else licence),
        "components": [
            {
                "bom-ref": f"file:{item['path']}",
                "type": "file",
                "name": item["path"],
                "hashes": [{"alg": "SHA-256", "content": item["sha256"]}],
            }
            for item in record["subjects"]
        ],
        "modelCard": {
            "modelParameters": {"datasets": [{"ref": node_id} for node_id in data]},
            "considerations": {
                "technicalLimitations": [f"License lineage: {record['effective']['decision']}. {record['disclaimer']}"]
            },
        },
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": version,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, _identity(record))}",
        "version": 1,
        "metadata": {
            "timestamp": f"{record['run']['date']}T00:00:00Z",
            "tools": {"components": [{"type": "application", "name": "kd-plugin", **_version(record)}]},
            "component": subject,
        },
        "components": [_component(node) for node in graph.nodes.values()],
        "dependencies": [{"ref": ref, "dependsOn": sorted(targets)} for ref, targets in sorted(depends.items())],
    }


def spdx(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an SPDX 3.0.1 document (JSON-LD) with the AI and dataset profiles."""
    graph = Graph.from_json(record)
    base = f"https://kd-plugin.invalid/{uuid.uuid5(_SPACE, _identity(record))}"
    made = "_:creation"
    tool = f"{base}/tool"
    elements: list[dict[str, Any]] = []

    def add(kind: str, place: str, /, **fields: Any) -> str:
        identifier = f"{base}/{place}"
        element = {"type": kind, "spdxId": identifier, "creationInfo": made, **fields}
        elements.append({k: v for k, v in element.items() if v is not None})
        return identifier

    def relate(source: str, kind: str, target: str, comment: str | None = None) -> None:
        name = f"relationship/{len(elements)}"
        add("Relationship", name, **{"from": source}, relationshipType=kind, to=[target], comment=comment)

    def licence(owner: str, expression: str | None) -> None:
        if expression and expression != "NONE":
            name = f"licence/{uuid.uuid5(_SPACE, expression)}"
            if not any(e["spdxId"] == f"{base}/{name}" for e in elements):
                add("simplelicensing_LicenseExpression", name, simplelicensing_licenseExpression=expression)
            relate(owner, "hasDeclaredLicense", f"{base}/{name}")

    add("Agent", "tool", name="kd-plugin")
    ids = {SELF: f"{base}/self"}
    name = str(record["student"].get("name") or "checkpoint")
    own = {"name": name, "software_packageVersion": str(record["checkpoint"]["step"])}
    add("ai_AIPackage", "self", **own, software_primaryPurpose="model", comment=record["disclaimer"])
    licence(ids[SELF], record["effective"]["license_expression"])
    for item in record["subjects"]:
        hashes = [{"type": "Hash", "algorithm": "sha256", "hashValue": item["sha256"]}]
        where = f"file/{uuid.uuid5(_SPACE, item['path'])}"
        weights = add("software_File", where, name=item["path"], verifiedUsing=hashes, software_primaryPurpose="model")
        relate(ids[SELF], "contains", weights)
    for node_id, node in graph.nodes.items():
        is_model = node.kind in _AI_KINDS
        extra = {"software_primaryPurpose": "model"} if is_model else {"dataset_datasetType": ["text"]}
        ids[node_id] = add(
            "ai_AIPackage" if is_model else "dataset_DatasetPackage",
            node_id,
            name=node.label,
            software_packageVersion=node.revision or node.digest,
            **extra,
        )
        licence(ids[node_id], node.expression)
    for edge in graph.edges:
        kind = "trainedOn" if graph.nodes[edge.target].kind not in _AI_KINDS else "descendantOf"
        relate(ids[edge.source], kind, ids[edge.target], edge.kind)
    document = {
        "type": "SpdxDocument",
        "spdxId": f"{base}/document",
        "creationInfo": made,
        "name": f"License lineage of {name}",
        # Not "ai" and "dataset": those profiles ask for suppliers, places and dates that a record need not know
        "profileConformance": ["core", "software", "simpleLicensing"],
        "rootElement": [ids[SELF]],
        "element": [element["spdxId"] for element in elements],
    }
    created = {
        "type": "CreationInfo",
        "@id": made,
        "specVersion": "3.0.1",
        "created": f"{record['run']['date']}T00:00:00Z",
        "createdBy": [tool],
    }
    return {"@context": _SPDX_CONTEXT, "@graph": [created, *elements, document]}


def _identity(record: Mapping[str, Any]) -> str:
    weights = " ".join(item["sha256"] for item in record["subjects"])
    return f"{record['run']['id']} {record['checkpoint']['step']} {weights}"


def _version(record: Mapping[str, Any]) -> dict[str, str]:
    version = record["run"].get("versions", {}).get("kd-plugin")
    return {"version": str(version)} if version else {}


def _component(node: Node) -> dict[str, Any]:
    component: dict[str, Any] = {
        "bom-ref": node.id,
        "type": "machine-learning-model" if node.kind in _AI_KINDS else "data",
        "name": node.label,
    }
    if node.revision or node.digest:
        component["version"] = node.revision or node.digest
    if node.weights:
        component["properties"] = [
            {"name": f"kd-plugin:sha256:{path}", "value": digest} for path, digest in sorted(node.weights.items())
        ]
    if node.copyright:
        component["copyright"] = "\n".join(node.copyright)
    return {**component, **_licences(node.expression)}


def _licences(expression: str | None) -> dict[str, Any]:
    return {"licenses": [{"expression": expression}]} if expression else {}
