"""Rules that look at several licences at once: names, share-alike, and the licence under which a student ships."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from kd_plugin.lineage.graph import SELF, Graph, Node, Path
from kd_plugin.lineage.terms import Clause, Terms
from kd_plugin.lineage.verdict import Finding, Student

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
