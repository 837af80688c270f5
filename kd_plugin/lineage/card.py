"""The model card: front matter that says what is so, and a section for people. The rest of the card is kept."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.front_matter import find_front, front_of, parse_yaml, with_keys
from kd_plugin.lineage.graph import SELF, Graph
from kd_plugin.lineage.record import SECTION_BEGIN as _BEGIN
from kd_plugin.lineage.record import SECTION_END as _END
from kd_plugin.lineage.record import write_file
from kd_plugin.lineage.verdict import NO_ADVICE

# Expressions without an SPDX id that the hub has an id for
_HUB_EXPRESSIONS = frozenset(
    "LicenseRef-" + hub_id
    for hub_id in (
        "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "bigscience-openrail-m",
        "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "creativeml-openrail-m",
    )
)  # fmt: skip
_TAG = "distillation"
_INDEX, _MEASURED = "model-index", "(kd-plugin)"
_INITIALISED = ("resumed_from", "initialized_from", "adapter_of")
_TEACHING = {"distilled_logits": "distributions", "trained_on_outputs": "text", "corrected_by": "corrections"}


def update_card(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the lineage into ``README.md`` of a checkpoint, whose own words stay as they are.

    A card under another spelling, such as ``readme.md``, is that file.

    Raises:
        LineageError: the file cannot be written.
    """
    spelled = sorted(path for path in directory.iterdir() if path.name.lower() == "readme.md")
    path = next((one for one in spelled if one.name == "README.md"), spelled[0] if spelled else directory / "README.md")
    # Bytes that are no UTF-8 pass through unchanged
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    write_file(path, card_text(text, record).encode("utf-8", "surrogateescape"))


def card_text(text: str, record: Mapping[str, Any]) -> str:
    """Return a card with the record's keys and section in the place of older ones, and all else as it was."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix("\ufeff")
    found = find_front(text)
    written = None
    if found is not None:
        try:
            text_of_front = f"{found.yaml}\n"
            front = parse_yaml(text_of_front.encode("utf-8", "surrogateescape"), "README.md")
            written = _with_record(text_of_front, front if isinstance(front, Mapping) else {}, record)
        except ConfigError:
            found = None  # what cannot be read as front matter stays in the card as text
    body = text[found.end :] if found else text
    written = _with_record("", {}, record) if written is None else written
    body = re.sub(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "\n", body, flags=re.DOTALL).strip("\n")
    title = "" if body else f"# {_text(record['student'].get('name') or 'Checkpoint')}"
    return f"{mark}---\n{written}---\n\n{body or title}\n\n{_BEGIN}\n{section(record)}\n{_END}\n"


def _with_record(text: str, front: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return front matter with the record's keys; other keys keep their very words, where those stand line by line."""
    own = own_keys(record)
    index = _model_index(front.get(_INDEX), record)
    if index is not None:
        own[_INDEX] = index
    stale = [key for key in ("licence", "license_name", "license_link") if key not in own]
    wanted = {key: value for key, value in front.items() if key not in stale} | own
    written = with_keys(text, own, drop=stale, add_tag=_TAG)
    try:
        found = parse_yaml(written.encode("utf-8", "surrogateescape"), "README.md")
    except ConfigError:
        found = None
    if isinstance(found, Mapping) and {k: v for k, v in found.items() if k != "tags"} == {
        k: v for k, v in wanted.items() if k != "tags"
    }:
        return written
    tags = wanted.get("tags")  # front matter in braces, on one line: written anew
    kept = [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []
    whole = wanted | {"tags": list(dict.fromkeys([*kept, _TAG]))}
    return str(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=120))


def own_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hub's metadata that the lineage decides: ``license``, ``base_model`` and a ``distillation`` block.

    ``base_model`` is the student's own initialisation: a list there would mean a merge, and the hub knows no
    relation for teachers. TRL 1.16 writes ``licence: license``, which is dropped.
    """
    graph = Graph.from_json(record)
    own = _license_fields(graph, record)
    base = _hub_base(graph)
    if base is not None:
        is_adapter = any(item["path"].startswith("adapter_model.") for item in record["subjects"])
        own |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    own["distillation"] = {
        "method": record["run"]["method"],
        "decision": record["effective"]["decision"],
        "lineage": "lineage.json",
        "teachers": _teachers(graph),
    }
    return own


def _model_index(given: Any, record: Mapping[str, Any]) -> Any:
    """Return the hub's ``model-index`` with what was measured in the place of what an older record said, or None.

    Args:
        given: that of the card; entries of others stay.
        record: the lineage.
    """
    kept = []
    for model in given if isinstance(given, list) else []:
        results = model.get("results") if isinstance(model, Mapping) else None
        if not isinstance(results, list):
            kept.append(model)
            continue
        others = [one for one in results if _MEASURED not in str(one)]
        if others or not results:
            kept.append({**model, "results": others})
    results = []
    for name, found in record.get("evaluation", {}).items():
        share = found["pass@1"]
        said = f"pass@1 [{share['low']:.3f}, {share['high']:.3f}], {share['questions']} questions {_MEASURED}"
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": name, "name": name},
                "metrics": [{"type": "accuracy", "value": round(share["value"], 4), "name": said}],
            }
        )
    if results:
        kept.append({"name": str(record["student"].get("name") or "student"), "results": results})
    return kept if kept or given is not None else None


def license_problem(text: str, record: Mapping[str, Any]) -> str | None:
    """Return how the licence in a card's front matter differs from what the record leads to, or None.

    Front matter that names no licence, or cannot be read, says nothing wrong.
    """
    written = front_of(text) or ""
    try:
        front = parse_yaml(written.encode("utf-8", "surrogateescape"), "README.md")
    except ConfigError:
        return None
    if not isinstance(front, Mapping) or front.get("license") is None:
        return None
    expected = _license_fields(Graph.from_json(record), record)
    seen = {key: front.get(key) for key in expected}
    return None if seen == expected else f"its front matter says {seen}; the lineage leads to {expected}"


def section_in(text: str) -> str | None:
    """Return the lineage section of a card, or None where it has none."""
    match = re.search(rf"{re.escape(_BEGIN)}\n(.*?)\n{re.escape(_END)}", text, re.DOTALL)
    return match[1] if match else None


def section(record: Mapping[str, Any]) -> str:
    """Return the card's section in Markdown: who taught this, under which terms, what is owed."""
    graph = Graph.from_json(record)
    effective = record["effective"]
    lines = [
        "## License lineage",
        "",
        f"Decision: **{_text(effective['decision'].replace('_', ' '))}**. Licence of the weights: "
        f"`{_text(effective['license_expression'])}`. {NO_ADVICE}",
        "",
        "| made from | how | terms |",
        "|---|---|---|",
    ]
    for edge in graph.edges:
        node = graph.nodes[edge.target]
        maker = "" if edge.source == SELF else f", by {_text(graph.nodes[edge.source].label)}"
        terms = ", ".join((*node.licenses, *node.services)) or "see what it was made from"
        lines.append(f"| {_text(node.label)} | {_text(edge.kind.replace('_', ' '))}{maker} | {_text(terms)} |")
    if effective["duties"]:
        lines += ["", "If you ship these weights, you owe:", ""]
        seen = dict.fromkeys((d["terms"], d["cite"], d["says"], d["basis"], d["status"]) for d in effective["duties"])
        for terms, cite, says, basis, status in seen:
            how = "" if basis == "explicit" else ", as a precaution"
            lines.append(f"- {_text(says)} ({_text(terms)} {_text(cite)}{how}; {_text(status)})")
    excepted = [f for f in effective["findings"] if f["severity"] == "overridden"]
    if excepted:
        lines += ["", "Stands only by recorded exceptions:", ""]
        lines += [f"- {_text(f['subject'])}: {_text(f['clause'])}: {_text(f['remedy'])}" for f in excepted]
    findings = [f for f in effective["findings"] if f["severity"] not in ("warning", "overridden")]
    if findings:
        lines += ["", "What stands in the way:", ""]
        lines += [f"- {_text(f['severity'])}: {_text(f['subject'])}: {_text(f['clause'])}" for f in findings]
    shown = sorted({d["value"] for d in effective["duties"] if d["kind"] == "display" and d.get("value")})
    lines += ["", *[f"{_text(value)}." for value in shown]] if shown else []
    lines += ["", "The full record is `lineage.json`; check it with `kd-plugin lineage verify DIR`."]
    return "\n".join(lines)


def _teachers(graph: Graph) -> list[dict[str, Any]]:
    """List who taught the checkpoint, and who taught what it was made from; the latter say whom they taught."""
    own = {SELF}  # the checkpoint, and the earlier ones of its run
    for edge in graph.edges:
        own |= {edge.target} if edge.kind == "resumed_from" and edge.source in own else set()
    found = []
    for edge in graph.edges:
        node = graph.nodes[edge.target]
        if edge.kind not in _TEACHING or node.kind not in ("model", "checkpoint"):
            continue
        pupil = edge.source
        while pupil not in own and graph.nodes[pupil].kind not in ("model", "checkpoint"):  # outputs that were stored
            users = [e.source for e in graph.edges if e.target == pupil]
            pupil = next((user for user in users if user in own), min(users, default=SELF))
        entry: dict[str, Any] = {"name": edge.role or node.name, "model": node.label, "signal": _TEACHING[edge.kind]}
        entry["license"] = list(node.licenses)
        if pupil not in own:
            entry["taught"] = graph.nodes[pupil].label
        if entry not in found:
            found.append(entry)
    return sorted(found, key=lambda entry: ("taught" in entry, entry["name"], entry["model"]))


def _license_fields(graph: Graph, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hub's licence fields: an id the hub knows where one says all, else a name and a link."""
    expression = record["effective"]["license_expression"]
    entries = {entry.get("spdx"): terms_id for terms_id, entry in record["terms"].items()}
    alone = entries.get(expression)
    if alone is not None and (expression in _HUB_EXPRESSIONS or not expression.startswith("LicenseRef-")):
        return {"license": alone}
    words = expression.replace("LicenseRef-", "").lower()
    name = "see-notice" if expression == "NONE" else re.sub(r"[^a-z0-9.]+", "-", words).strip("-")
    return {"license": "other", "license_name": name, "license_link": "NOTICE"}


def _hub_base(graph: Graph) -> str | None:
    """Follow the initialisation back to the first model that the hub knows."""
    at, seen = SELF, {SELF}
    while True:
        step = next((e for e in graph.edges if e.source == at and e.kind in _INITIALISED), None)
        if step is None or step.target in seen:
            return None
        node = graph.nodes[step.target]
        if node.repo is not None:
            return node.repo
        seen.add(step.target)
        at = step.target


def _text(value: Any) -> str:
    """Escape what a stranger may have written, for Markdown that may be shown as HTML."""
    return re.sub(r"([|`*_\[\]<>])", r"\\\1", html.escape(str(value), quote=False)).replace("\n", " ")
