"""From a graph and the terms of its nodes to a verdict. Pure functions: no files, no network, no clock.

Each clause is looked at by itself; then names, share-alike, and the licence under which the student ships, over all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from kd_plugin.errors import LineageError
from kd_plugin.lineage.graph import SELF, Graph, Node, Path
from kd_plugin.lineage.readings import IN_PROSE, IN_ROWS, ITS_NAME
from kd_plugin.lineage.sources import OWN, Clause, Terms, others_own
from kd_plugin.lineage.verdict import (
    DECISIONS,
    FACTS,
    Decision,
    Duty,
    Finding,
    Override,
    Student,
    Verdict,
    apply_overrides,
)

_STEP = 1000  # from one decision to the next in a severity; below it, what tells readings of one decision apart
RULES = 2  # version of the rules below; a record says by which it was checked
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


@dataclass
class _Tally:
    findings: list[Finding] = field(default_factory=list)
    duties: list[Duty] = field(default_factory=list)
    severity: int = 0

    def raise_to(self, decision: Decision) -> None:
        self.severity = max(self.severity, DECISIONS.index(decision))


def evaluate(
    graph: Graph,
    terms: Mapping[str, Terms],
    facts: Mapping[str, bool | None],
    student: Student | None = None,
    overrides: Sequence[Override] = (),
    on: str = "",
    rules: int = RULES,
) -> Verdict:
    """Decide what a checkpoint with this lineage may be used for, and what is owed.

    Args:
        graph: the lineage; its ``self`` is the checkpoint.
        terms: every entry that a node names, by id.
        facts: declared answers to :data:`FACTS`; a missing or None answer is not known.
        student: name and licence under which the checkpoint would be shipped.
        overrides: recorded exceptions.
        on: ISO date on which they must be in force.
        rules: version of the rules: 1 leaves out what later versions ask, so that an old record can be recomputed.

    Raises:
        LineageError: a node names terms that are not given.
    """
    student = student or Student()
    tally = _Tally()
    paths = graph.paths()
    own = {i for n, ps in paths.items() for p in ps if p.reach == "weights" for i in graph.nodes[n].licenses}
    hits: list[Hit] = []
    with_rows = {edge.source for edge in graph.edges if graph.nodes[edge.target].kind == "dataset"}
    for node_id in sorted(paths):
        node = graph.nodes[node_id]
        _check_declaration(node, paths[node_id][0], tally)
        if rules > 1:
            _check_words(node, paths[node_id][0], node_id in with_rows, tally)
        for terms_id in (*node.licenses, *node.services):
            if terms_id not in terms:
                raise LineageError(f"Lineage names terms {terms_id!r}, which neither registry nor record holds.")
            for clause in terms[terms_id].clauses:
                hit = _first_hit(node, terms[terms_id], clause, paths[node_id], rules)
                if hit is not None and not own & set(clause.unless_student):
                    hits.append(hit)
                    _apply(hit, facts, student, tally)
    for node_id in sorted(others_own(graph) & paths.keys()) if rules > 1 else ():
        tally.findings.append(_own_of_another(graph.nodes[node_id], paths[node_id][0]))
    tally.findings += [*shipping_findings(hits, student, terms), *changed_texts(graph, paths)]
    findings = [apply_overrides(f, terms, overrides, on) for f in dict.fromkeys(tally.findings)]
    for finding in findings:
        if finding.severity in DECISIONS:
            tally.raise_to(finding.severity)  # type: ignore[arg-type]
    order = {"block": 0, "violation": 1, "unknown": 2, "overridden": 3, "conditional": 4, "warning": 5}
    return Verdict(
        decision=DECISIONS[tally.severity],
        findings=tuple(sorted(findings, key=lambda f: (order[f.severity], f.code, f.node, f.clause, f.path))),
        obligations=tuple(sorted(set(tally.duties), key=lambda d: (d.terms, d.cite, d.kind, d.node, d.path))),
        license_expression=_expression(graph, terms, paths, student, rules),
    )


def severity_of(terms: Terms) -> int:
    """Rank an entry as a teacher of distributions, to tell which of two readings is more severe."""
    node = Node("model", "x", licenses=(terms.id,))
    tally = _Tally()
    for clause in terms.clauses:
        hit = _first_hit(node, terms, clause, [Path("logits", False, (SELF,)), Path("weights", False, (SELF,))])
        if hit is not None:
            _apply(hit, {}, Student(), tally)
    for finding in tally.findings:
        if finding.severity in DECISIONS:  # a violation, such as a name not given here, is none
            tally.raise_to(finding.severity)  # type: ignore[arg-type]
    return tally.severity * _STEP + len(tally.findings) * 50 + len(terms.clauses)


def decision_of(terms: Terms) -> Decision:
    """Return what an entry alone says of a teacher of distributions and of weights, with no fact declared."""
    return DECISIONS[severity_of(terms) // _STEP]


def _reaches(node: Node, path: Path, rules: int) -> set[str]:
    """Return how a node's terms touch the checkpoint: rows under the terms of a model are that model's outputs too."""
    as_outputs = rules > 1 and node.kind == "dataset" and path.reach == "data"
    return {path.reach, "outputs"} if as_outputs else {path.reach}


def _first_hit(node: Node, terms: Terms, clause: Clause, paths: list[Path], rules: int = RULES) -> Hit | None:
    """Return the clause's firmest touch: explicit before precautionary, then the shortest path."""
    if node.repo is not None and node.repo in clause.unless_repo:
        return None
    hits = []
    for path in paths:
        reaches = _reaches(node, path, rules)
        derivative = bool(reaches & set(terms.inherits))  # terms that make outputs derivatives bind again, however far
        if reaches & set(clause.reach):
            hits.append(Hit(node, terms, clause, path, explicit=not path.remote or derivative))
        elif path.reach in clause.precaution:
            hits.append(Hit(node, terms, clause, path, explicit=False))
    return min(hits, key=lambda h: (not h.explicit, len(h.path.nodes), h.path.nodes), default=None)


def _apply(hit: Hit, facts: Mapping[str, bool | None], student: Student, tally: _Tally) -> None:
    clause = hit.clause
    if clause.effect == "unknown":
        tally.findings.append(_finding(hit, "unknown_license", "unknown", "training", _cure(hit.node, hit.terms)))
        return
    answer = facts.get(clause.fact) if clause.fact else True
    if answer is None:
        question = FACTS.get(clause.fact or "", "see the clause")
        remedy = f"say it once in the config: `lineage: {{use: {{{clause.fact}: true | false}}}}` ({question})"
        tally.findings.append(_finding(hit, "fact_missing", "conditional", clause.trigger, remedy))
    if clause.effect == "forbid":
        if answer:
            remedy = "choose a source whose terms allow it, or obtain written permission and record it in overrides"
            tally.findings.append(_finding(hit, "forbidden", "block", clause.trigger, remedy))
        else:
            tally.raise_to("allow_with_duties")
            tally.duties.append(_duty(hit, "attest"))
        return
    tally.raise_to("allow_with_duties")
    if clause.kind != "name_prefix":
        tally.duties.append(_duty(hit, "attest"))
        return
    named = student.name is not None and student.name.startswith(clause.value or "")
    tally.duties.append(_duty(hit, "met" if named else "unmet"))
    if answer and not named:
        seen = "no name is declared" if student.name is None else f"the declared name is {student.name!r}"
        remedy = f"declare a name that begins with it: `lineage: {{student: {{name: {clause.value}-...}}}}`"
        tally.findings.append(replace(_finding(hit, "name_prefix", "violation", "distribution", remedy), evidence=seen))


def _check_declaration(node: Node, path: Path, tally: _Tally) -> None:
    """Note what is known of the node itself, whatever its terms say."""
    if node.undeclared and node.kind == "dataset":
        remedy = "declare it: `lineage: {datasets: [{repo: NAME, license: ID}]}`"
        evidence = "data passed in memory"
        tally.findings.append(_note("undeclared_dataset", node, path, "no terms were declared", evidence, remedy))
    elif node.undeclared:
        remedy = "read its terms, and declare the more severe licence where they differ"
        evidence = "nothing was found; the licence that the user declared for what was made from it stands for it"
        tally.findings.append(_note("base_not_read", node, path, "the terms of a base were not read", evidence, remedy))
    readings = {e.ids for e in node.evidence if e.ids}
    if len(readings) > 1:
        seen = "; ".join(f"{e.where}: {e.value}" for e in node.evidence if e.ids)
        remedy = "the more severe reading counts; correct the source that is wrong"
        clause = "sources disagree on the licence"
        tally.findings.append(_note("sources_disagree", node, path, clause, seen, remedy))


def _check_words(node: Node, path: Path, rows: bool, tally: _Tally) -> None:
    """Note where the user alone says so, and what is to be asked about a dataset."""
    said = [e for e in node.evidence if e.ids and node.kind in ("model", "dataset")]
    if said and all(e.voice == "user" for e in said) and not {OWN, "unknown"} & set(node.licenses):
        remedy = "keep what you read of its terms beside it: a LICENSE file, or a card that names its licence"
        seen = "; ".join(f"{e.where}: {e.value}" for e in said)
        clause = "nothing but the declaration supports its licence"
        tally.findings.append(_note("declaration_alone", node, path, clause, seen, remedy))
    for e in node.evidence:
        if e.where == ITS_NAME and not e.ids:
            remedy = "check the explanation against the licence that came with it"
            clause = "its name speaks of another licence than was declared"
            tally.findings.append(_note("name_explained", node, path, clause, e.value, remedy))
    asked = "; ".join(f"{e.where}: {e.value}" for e in node.evidence if e.where in (IN_PROSE, IN_ROWS))
    if asked:
        remedy = (
            f"say who wrote it: `lineage: {{datasets: [{{repo: {node.label}, generated_by: []}}]}}`, with names if any"
        )
        clause = "its own words leave open which models wrote it"
        tally.findings.append(_note("writers_not_declared", node, path, clause, asked, remedy))
    if node.kind == "teacher_outputs" and not rows and node.licenses != ("unknown",):
        remedy = "capture again with a kd-plugin that records the rows, or declare them: `lineage: {datasets: [...]}`"
        evidence = "its record names no dataset"
        tally.findings.append(
            _note("undeclared_dataset", node, path, "its rows are of no known origin", evidence, remedy)
        )


def _own_of_another(node: Node, path: Path) -> Finding:
    """Ask whose ``own`` it is: a record speaks for whoever wrote it."""
    return Finding(
        "own_of_another", "unknown", "training", node.id, node.label, path.nodes,
        "a record calls it its writer's own", "only your own configuration can call something yours",
        "if you wrote that record, declare what brought it as yours: `license: own` for the student or teacher that "
        "starts from it, or `lineage: {teachers: {NAME: {license: own}}}` with the name of a cache's teacher",
    )  # fmt: skip


def _note(code: str, node: Node, path: Path, clause: str, evidence: str, remedy: str) -> Finding:
    return Finding(code, "warning", "training", node.id, node.label, path.nodes, clause, evidence, remedy)


def _cure(node: Node, terms: Terms) -> str:
    if terms.kind == "service":
        return (
            "if the server is yours, say so: `lineage: {teachers: {NAME: {endpoint_terms: own}}}`; else describe its "
            "terms in a registry of your own, as a [[service]] with `hosts`, or choose another server"
        )
    if node.kind == "dataset":
        return f"declare it: `lineage: {{datasets: [{{repo: {node.label}, license: ID}}]}}`"
    return "declare its licence, `own` if it is yours: `lineage: {teachers: {NAME: {license: apache-2.0}}}`"


def _finding(hit: Hit, code: str, severity: Any, trigger: Any, remedy: str) -> Finding:
    seen = "; ".join(f"{e.where}: {e.value}" for e in hit.node.evidence) or "nothing was found that names its terms"
    clause = f"{hit.terms.name}, {hit.clause.cite}: {hit.clause.says}"
    if not hit.explicit:
        clause += " (precautionary)"
    return Finding(
        code, severity, trigger, hit.node.id, hit.node.label, hit.path.nodes, clause, seen, remedy,
        hit.terms.id, hit.clause.cite,
    )  # fmt: skip


def _duty(hit: Hit, status: Any) -> Duty:
    return Duty(
        hit.terms.id, hit.clause.cite, hit.clause.kind, hit.clause.says, hit.clause.value, hit.node.id,
        hit.path.nodes, "explicit" if hit.explicit else "precautionary", status,
    )  # fmt: skip


def _expression(
    graph: Graph, terms: Mapping[str, Terms], paths: Mapping[str, list[Path]], student: Student, rules: int
) -> str:
    """AND together the licences that bind the weights: initialisation, and terms that a student inherits."""
    binding = {
        terms[i].spdx
        for node_id, ways in paths.items()
        for i in graph.nodes[node_id].licenses
        if any(_reaches(graph.nodes[node_id], way, rules) & set(terms[i].inherits) for way in ways)
    }
    binding |= {terms[i].spdx for i in student.declared_license}
    return " AND ".join(sorted(s for s in binding if s)) or "NONE"


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
        _contradiction(
            prefixes[b], "name_conflict", f"a name must begin with {a!r} and with {b!r}", "choose other sources"
        )
        for a, b in combinations(sorted(prefixes), 2)
        if not (a.startswith(b) or b.startswith(a))
    ]


def _share_alike_conflicts(hits: Iterable[Hit]) -> list[Finding]:
    asked = {hit.terms.id: hit for hit in hits if hit.clause.kind == "share_alike" and hit.explicit}
    return [
        _contradiction(
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
            found.setdefault(hit.terms.id, _contradiction(hit, "declared_license_weaker", clause, remedy))
    return list(found.values())


def _contradiction(hit: Hit, code: str, clause: str, remedy: str) -> Finding:
    evidence = f"{hit.terms.name}, {hit.clause.cite}, of {hit.node.label}"
    return Finding(code, "violation", "distribution", SELF, "the checkpoint", hit.path.nodes, clause, evidence, remedy)
