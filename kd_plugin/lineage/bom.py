"""The lineage as a bill of materials: CycloneDX 1.7, and SPDX 3.0.1. Same record, same bytes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from kd_plugin.lineage.graph import SELF, Graph, Node

# Both documents are put together here, and tests validate them with the two projects' own libraries. At run time those
# would not do: cyclonedx-python-lib (11.12) has no model cards, where CycloneDX names datasets and limits of use, and
# spdx-python-model (0.0.6) is a preview of bindings that are still to change.
CYCLONEDX = ("1.7", "1.6")  # the first is written; checkpoints that were saved with the other verify as before
_SPACE = uuid.UUID("6f1a3c1e-5a0e-4c53-9a3b-1d7c8f1f2b6d")  # namespace of this package's identifiers
_SPDX_CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
_AI_KINDS = ("model", "checkpoint")


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
