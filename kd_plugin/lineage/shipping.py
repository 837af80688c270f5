"""What whoever ships a student owes: rules over several licences at once, and the files that fulfil the duties.

The rules look at names, at share-alike, and at the licence under which the student ships.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from kd_plugin.lineage.graph import SELF, Graph, Node, Path
from kd_plugin.lineage.record import NOTICE_HEADER
from kd_plugin.lineage.registry import Registry
from kd_plugin.lineage.sources import Clause, Terms
from kd_plugin.lineage.verdict import NO_ADVICE, Duty, Finding, Student, Verdict

# What a licence may ask and a student's own licence need not repeat: the notices travel beside it.
_MET_BY_FILES = (
    "notice", "license_text", "attribution", "state_changes", "display", "guardrails", "patent_grant", "no_endorsement",
)  # fmt: skip
# Share-alike licences under which one derivative can satisfy both (each pair by the words of one of the two).
_COMPATIBLE = frozenset(
    map(
        frozenset,
        [
            ("gpl-3.0", "agpl-3.0"),  # GPL-3.0 section 13
            ("gpl-3.0", "lgpl-3.0"),  # LGPL-3.0 is GPL-3.0 with permissions added
            ("gpl-2.0", "lgpl-2.1"),  # LGPL-2.1 section 3
            ("gpl-3.0", "lgpl-2.1"),
            ("agpl-3.0", "lgpl-3.0"),
            ("cc-by-sa-3.0", "cc-by-sa-4.0"),  # CC-BY-SA-3.0 section 4(b): a later version
            ("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
            ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
            ("cc-by-nc-sa-2.0", "cc-by-nc-sa-4.0"),
            ("cc-by-sa-4.0", "gpl-3.0"),  # Creative Commons' list of compatible licences
            ("mpl-2.0", "gpl-2.0"),  # MPL-2.0 section 3.3, secondary licences
            ("mpl-2.0", "gpl-3.0"),
            ("mpl-2.0", "lgpl-2.1"),
            ("mpl-2.0", "agpl-3.0"),
            ("eupl-1.2", "gpl-3.0"),  # EUPL appendix
            ("eupl-1.2", "gpl-2.0"),
            ("eupl-1.2", "agpl-3.0"),
        ],
    )
)


@dataclass(frozen=True)
class Hit:
    """A clause that touches the checkpoint.

    Attributes:
        node: whose terms they are.
        terms: the licence or terms of service.
        clause: the clause.
        path: how the node reaches the checkpoint.
        explicit: whether the clause binds by its words, or is kept as a precaution.
    """

    node: Node
    terms: Terms
    clause: Clause
    path: Path
    explicit: bool


def shipping_findings(hits: Sequence[Hit], student: Student, terms: Mapping[str, Terms]) -> list[Finding]:
    """Return what forbids shipping although no clause alone does."""
    return [*_name_conflicts(hits), *_share_alike_conflicts(hits), *_weaker_license(hits, student, terms)]


def changed_texts(graph: Graph, paths: Mapping[str, Sequence[Path]]) -> list[Finding]:
    """Return a violation for every source that shows two licence texts at one revision: one of them was changed."""
    seen: dict[tuple[str, str], Node] = {}
    findings = []
    for node_id in sorted(paths):
        node = graph.nodes[node_id]
        if node.repo is None or node.revision is None or node.text_sha256 is None:
            continue
        first = seen.setdefault((node.repo, node.revision), node)
        if first.text_sha256 != node.text_sha256:
            evidence = f"sha256 {first.text_sha256} and {node.text_sha256} at revision {node.revision}"
            path = paths[node_id][0].nodes
            remedy = "get the source again and find out which text it was published with"
            clause = "its licence text changed although its revision did not"
            findings.append(
                Finding(
                    "license_text_changed", "violation", "distribution", node_id, node.label, path, clause, evidence,
                    remedy,
                )
            )  # fmt: skip
    return findings


def _name_conflicts(hits: Iterable[Hit]) -> list[Finding]:
    prefixes = {hit.clause.value or "": hit for hit in hits if hit.clause.kind == "name_prefix"}
    return [
        _finding(prefixes[b], "name_conflict", f"a name must begin with {a!r} and with {b!r}", "choose other sources")
        for a, b in combinations(sorted(prefixes), 2)
        if not (a.startswith(b) or b.startswith(a))
    ]


def _share_alike_conflicts(hits: Iterable[Hit]) -> list[Finding]:
    asked = {hit.terms.id: hit for hit in hits if hit.clause.kind == "share_alike" and hit.explicit}
    return [
        _finding(
            asked[b],
            "share_alike_conflict",
            f"{asked[a].terms.name} and {asked[b].terms.name} each ask to be the licence of what is derived",
            "choose sources whose share-alike terms are compatible, or do not distribute",
        )
        for a, b in combinations(sorted(asked), 2)
        if frozenset((a, b)) not in _COMPATIBLE
    ]


def _weaker_license(hits: Iterable[Hit], student: Student, terms: Mapping[str, Terms]) -> list[Finding]:
    """Compare the licence under which the student would be shipped with what its sources ask."""
    declared = set(student.declared_license)
    if not declared:
        return []
    kinds = {clause.kind for i in declared for clause in terms[i].clauses}
    found: dict[str, Finding] = {}
    for hit in hits:
        if hit.terms.kind != "license" or hit.terms.id in declared or hit.clause.kind in _MET_BY_FILES:
            continue
        binding = hit.path.reach in hit.terms.inherits and hit.explicit
        non_commercial = hit.clause.kind == "non_commercial" and "non_commercial" not in kinds
        if binding or non_commercial:
            remedy = f"declare what binds it: `lineage: {{student: {{declared_license: {hit.terms.id}}}}}`"
            clause = f"the declared licence {' AND '.join(sorted(declared))} asks less than {hit.terms.name}"
            found.setdefault(hit.terms.id, _finding(hit, "declared_license_weaker", clause, remedy))
    return list(found.values())


def _finding(hit: Hit, code: str, clause: str, remedy: str) -> Finding:
    evidence = f"{hit.terms.name}, {hit.clause.cite}, of {hit.node.label}"
    return Finding(code, "violation", "distribution", SELF, "the checkpoint", hit.path.nodes, clause, evidence, remedy)


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
