"""Which duties the files beside a checkpoint fulfil, and those files' contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kd_plugin.lineage.graph import Graph, Node
from kd_plugin.lineage.registry import Registry
from kd_plugin.lineage.terms import Terms
from kd_plugin.lineage.traces import NOTICE_HEADER
from kd_plugin.lineage.verdict import NO_ADVICE, Duty, Finding, Verdict


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
