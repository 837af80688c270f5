"""Recomputing a checkpoint's lineage from its files alone, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage import hashing, shipping
from kd_plugin.lineage.card import license_problem, section, section_in
from kd_plugin.lineage.directory import printable
from kd_plugin.lineage.discovery import record_overrides
from kd_plugin.lineage.graph import Graph
from kd_plugin.lineage.policy import RULES, evaluate
from kd_plugin.lineage.readings import read_again
from kd_plugin.lineage.record import (
    BOM,
    LICENSES,
    MAX_RECORD,
    NOTICE,
    RECORD,
    canonical,
    digest_of,
    lineage_directory,
    read_record,
    time_seal,
    weights_of,
)
from kd_plugin.lineage.registry import Registry, default_registry
from kd_plugin.lineage.shipping import CYCLONEDX, bom_text
from kd_plugin.lineage.sources import Terms
from kd_plugin.lineage.verdict import Student, Verdict, in_force


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint's lineage.

    Attributes:
        kind: ``violation`` of terms, ``tampered`` files, or an ``incomplete`` checkpoint.
        where: file, duty or field.
        message: what was seen and expected.
    """

    kind: Literal["violation", "tampered", "incomplete"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.message}"


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of :func:`verify`.

    Attributes:
        directory: what was verified.
        problems: everything found, in the order of the checks.
        notes: what could not be checked, and why that is no problem.
        verdict: the recomputed verdict, or None where the record is unreadable.
    """

    directory: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    verdict: Verdict | None = None

    @property
    def exit_code(self) -> int:
        """0 good, 1 violation, 2 tampered, 3 incomplete; tampering outranks the others."""
        kinds = {problem.kind for problem in self.problems}
        return 2 if "tampered" in kinds else 3 if "incomplete" in kinds else 1 if "violation" in kinds else 0


def verify(directory: str | Path, registry: Registry | None = None) -> VerifyReport:
    """Check a checkpoint's lineage against its files, recomputing digests and verdict; no network, no model.

    Args:
        directory: the checkpoint.
        registry: the registry by which it should have been checked; None is the package's.

    Raises:
        LineageError: there is nothing at ``directory``.
    """
    registry = registry or default_registry()
    weights = Path(directory)
    if not weights.exists():
        raise LineageError(f"{str(weights)!r} is not there; expected a checkpoint.")
    directory = lineage_directory(weights)
    path = directory / RECORD
    if not path.is_file():
        problem = Problem(
            "incomplete", RECORD, "it is missing: the checkpoint was not finished, or it was saved without lineage"
        )
        return VerifyReport(directory, (problem,))
    try:
        record, raw = read_record(path)
        problems = _check_record(record, raw)
    except LineageError as error:
        return VerifyReport(directory, (Problem("tampered", RECORD, str(error)),))
    problems += _check_subjects(weights_of(directory), record)
    problems += _check_files(directory, record)
    verdict, found = _check_verdict(record, registry)
    problems += found
    notes = [f"{name}/ has a lineage of its own and was not checked" for name in hashing.apart(weights_of(directory))]
    notes += _texts_of_others(directory, record)
    if record["policy"].get("sha256") != registry.sha256:
        notes.append(
            f"checked with registry {record['policy'].get('version')}, not the one at hand ({registry.version}): "
            "its own copy of the terms was used, and compared with the one at hand"
        )
    for more, said in (_check_parent(directory, record), _check_card(directory, record, registry)):
        problems += more
        notes += said
    return VerifyReport(directory, tuple(problems), tuple(notes), verdict)


def _check_record(record: Mapping[str, Any], raw: bytes) -> list[Problem]:
    problems = []
    try:
        expected, bytes_expected = digest_of(record), canonical(record)
    except (ValueError, RecursionError) as error:
        raise LineageError(f"{RECORD} holds what canonical JSON cannot ({error}); it was edited.") from error
    if record["digest"] != expected:
        problems.append(Problem("tampered", RECORD, f"its digest is {expected}, it says {record['digest']!r}"))
    elif raw != bytes_expected:
        problems.append(Problem("tampered", RECORD, "its bytes are not canonical JSON; it was rewritten"))
    saved = record["saved_at"]
    if set(saved) != {"time", "seal"} or saved["seal"] != time_seal(record["digest"], str(saved["time"])):
        problems.append(Problem("tampered", RECORD, "saved_at does not fit its seal"))
    return problems


def _check_subjects(weights: Path, record: Mapping[str, Any]) -> list[Problem]:
    promised = _entries(record["subjects"])
    if promised is None:
        return [Problem("tampered", RECORD, "its list of weight files is malformed")]
    problems = []
    try:
        there = {subject.path: subject for subject in hashing.subjects(weights)}
        aside = hashing.weights_aside(weights)
    except LineageError as error:
        return [Problem("tampered", "weights", str(error))]
    problems += _check_aside(weights, aside)
    for name in sorted(promised.keys() | there.keys()):
        if name not in there:
            problems.append(Problem("tampered", name, "the weight file is missing"))
        elif name not in promised:
            problems.append(Problem("tampered", name, "a weight file that the record does not know"))
        elif (there[name].sha256, there[name].size) != promised[name]:
            problems.append(Problem("tampered", name, f"sha256 {there[name].sha256} is not {promised[name][0]}"))
    return problems


def _check_aside(weights: Path, aside: Sequence[Path]) -> list[Problem]:
    """Report weights in places that a record does not cover: hidden and linked directories, unfinished checkpoints."""
    problems = []
    for folder, names in groupby(aside, key=lambda path: path.parent):
        where = printable(folder.relative_to(weights).as_posix())
        shown = ", ".join(printable(path.name) for path in names)
        if hashing.is_checkpoint_name(folder.relative_to(weights).parts[0]) and not (folder / RECORD).exists():
            message = f"weights without a lineage ({shown}): a checkpoint that was not finished"
            problems.append(Problem("incomplete", where, message))
            continue
        problems.append(Problem("tampered", where, f"weight files that no record knows: {shown}"))
    return problems


def _check_files(directory: Path, record: Mapping[str, Any]) -> list[Problem]:
    promised = _entries(record["files"])
    if promised is None or not {NOTICE, BOM} <= promised.keys():
        return [Problem("tampered", RECORD, "its list of lineage files is malformed")]
    problems = []
    for name, (digest, size) in sorted(promised.items()):
        path = directory / name
        if name not in (NOTICE, BOM) and PurePosixPath(name).parent.as_posix() != LICENSES:
            problems.append(Problem("tampered", RECORD, f"it lists {name!r}, which is no lineage file"))
        elif not path.is_file():
            problems.append(Problem("tampered", name, "the file is missing"))
        elif path.stat().st_size != size or hashing.sha256_file(path) != digest:
            problems.append(Problem("tampered", name, "its text was changed"))
    return problems


def _texts_of_others(directory: Path, record: Mapping[str, Any]) -> list[str]:
    """Note licence texts that someone added; the record vouches for none of them."""
    folder, promised = directory / LICENSES, _entries(record["files"]) or {}
    names = [f"{LICENSES}/{path.name}" for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return [f"{printable(name)} is not of this record" for name in names if name not in promised]


def _check_verdict(record: Mapping[str, Any], registry: Registry) -> tuple[Verdict | None, list[Problem]]:
    """Recompute the verdict from the record's own nodes, terms and facts; compare with what it says."""
    try:
        graph = Graph.from_json(record)
        terms = {i: Terms.from_mapping(entry, f"terms {i!r}") for i, entry in record["terms"].items()}
        student = Student(record["student"].get("name"), tuple(record["student"].get("declared_license", ())))
        facts = record["policy"]["facts"]
        overrides = record_overrides(record)
        rules = _rules_of(record)
        verdict = evaluate(graph, terms, facts, student, overrides, str(record["run"]["date"]), rules)
        verdict = shipping.settle(verdict, graph, terms)
        notice = shipping.notice_text(graph, terms, verdict)
    except (LineageError, ConfigError, KeyError, TypeError, AttributeError) as error:
        return None, [Problem("tampered", RECORD, f"the verdict cannot be recomputed: {error}")]
    problems = []
    same_policy = record["policy"].get("sha256") == registry.sha256 and rules == RULES
    if _comparable(verdict.to_json(), same_policy) != _comparable(record["effective"], same_policy):
        problems.append(Problem("tampered", RECORD, "decision, duties or findings are not what its lineage leads to"))
    reread, ids = read_again(graph, registry)
    problems += _contradictions(graph, reread, ids, same_policy)
    if same_policy:
        for terms_id, entry in terms.items():
            if registry.terms.get(terms_id) != entry:
                problems.append(Problem("tampered", RECORD, f"its copy of terms {terms_id!r} is not the registry's"))
        promised = {entry["path"]: entry["sha256"] for entry in record["files"]}
        try:
            texts = {f"{LICENSES}/{n}": t for n, t in shipping.license_files(graph, terms, registry).items()}
            wanted = {NOTICE: [notice], BOM: [bom_text(record, version) for version in CYCLONEDX]}
            wanted |= {name: [text] for name, text in texts.items()}
            digests = {name: {hashing.sha256_text(form) for form in forms} for name, forms in wanted.items()}
        except (LookupError, ValueError, TypeError) as error:  # texts that the registry does not have, surrogates
            problems.append(Problem("tampered", RECORD, f"its files cannot be made again: {error}"))
            digests = {}
        for name, accepted in digests.items():
            if promised.get(name) not in accepted:
                problems.append(Problem("tampered", name, "it is not what the lineage asks for"))
    else:
        named = {i for node in reread.nodes.values() for i in (*node.licenses, *node.services)}
        at_hand = {i: registry.terms[i] if i in registry.terms else terms[i] for i in {*terms, *named}}
        again = evaluate(reread, at_hand, facts, student, overrides, str(record["run"]["date"]), rules)
        problems += _stricter_today(verdict, shipping.settle(again, reread, at_hand), registry)
    problems += [Problem("violation", f.subject, str(f)) for f in verdict.publication_stops]
    today = datetime.now(UTC).date().isoformat()
    for one in overrides:
        if not in_force([one], today) and any(f.severity == "overridden" for f in verdict.findings):
            when = f"expired on {one.expires}" if one.expires < today else f"begins on {one.approved_on}"
            message = f"the exception by {one.approved_by} for {one.subject} ({one.terms}) {when}"
            problems.append(Problem("violation", "overrides", message))
    return verdict, problems


def _rules_of(record: Mapping[str, Any]) -> int:
    """Return by which version of the rules a record was checked; the first one is not named."""
    rules = record["policy"].get("rules", 1)
    if not isinstance(rules, int) or not 1 <= rules <= RULES:
        raise LineageError(f"policy.rules is {rules!r}; expected 1 to {RULES}, or a newer kd-plugin")
    return rules


def _contradictions(graph: Graph, reread: Graph, ids: Mapping[str, str], same_policy: bool) -> list[Problem]:
    """Report nodes whose terms are not what their own evidence gives; another registry may weigh readings otherwise."""
    problems = []
    for old_id, node in graph.nodes.items():
        again = reread.nodes[ids[old_id]]
        read = {e.ids for e in node.evidence if e.ids} | ({node.licenses} if node.undeclared else set())
        if again != node and (same_policy or node.licenses not in read):
            seen = ", ".join((*node.licenses, *node.services)) or "nothing"
            leads = ", ".join((*again.licenses, *again.services)) or "nothing"
            message = f"{printable(node.label)} is said to stand under {seen}; its evidence leads to {leads}"
            problems.append(Problem("tampered", RECORD, message))
    return problems


def _comparable(effective: Mapping[str, Any], same_policy: bool) -> Mapping[str, Any]:
    """Leave out how a remedy is worded, which another version of this package may word otherwise."""
    if same_policy:
        return effective
    findings = [{k: v for k, v in finding.items() if k != "remedy"} for finding in effective["findings"]]
    return {**effective, "findings": findings}


def _stricter_today(recorded: Verdict, again: Verdict, registry: Registry) -> list[Problem]:
    """Report what the registry at hand asks and the record's own copy of the terms does not."""
    known = {(d.terms, d.kind, d.node) for d in recorded.obligations}
    stopped = {(f.terms, f.code, f.node) for f in recorded.publication_stops}
    asked = [f"{d.terms} {d.cite}: {d.says}" for d in again.obligations if (d.terms, d.kind, d.node) not in known]
    asked += [str(f) for f in again.publication_stops if (f.terms, f.code, f.node) not in stopped]
    where = f"registry {registry.version}"
    return [Problem("violation", where, f"it asks what the record does not: {words}") for words in dict.fromkeys(asked)]


def _check_parent(directory: Path, record: Mapping[str, Any]) -> tuple[list[Problem], list[str]]:
    """Compare the parent's digest with the parent, where it still lies beside this checkpoint."""
    parent = record["checkpoint"].get("parent")
    if parent is None:
        return [], []
    name = parent.get("name") if isinstance(parent, Mapping) else None
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name:
        return [Problem("tampered", RECORD, "its parent is malformed")], []
    sibling = lineage_directory(directory.resolve().parent / name) / RECORD
    if not sibling.is_file():
        return [], [f"parent {name!r} is no longer beside this checkpoint; its digest could not be compared"]
    try:
        before, _ = read_record(sibling)
    except LineageError as error:
        return [Problem("tampered", f"../{name}/{RECORD}", str(error))], []
    if before["digest"] != parent.get("digest") or digest_of(before) != before["digest"]:
        return [Problem("tampered", f"../{name}/{RECORD}", "it is not the parent that this record was chained to")], []
    return [], []


def _check_card(directory: Path, record: Mapping[str, Any], registry: Registry) -> tuple[list[Problem], list[str]]:
    """Compare the card's section with the record. A trainer may write its own card again, without the section."""
    path = directory / "README.md"
    if record["policy"].get("sha256") != registry.sha256 or not path.is_file():
        return [], []
    with path.open("rb") as file:
        text = file.read(MAX_RECORD).decode("utf-8", "replace").replace("\r\n", "\n")
    found = section_in(text)
    try:
        expected, wrong = section(record), license_problem(text, record)
    except (LineageError, KeyError, TypeError, AttributeError):
        return [], []  # the record is malformed, which is reported already
    problems = [Problem("violation", "README.md", wrong)] if wrong else []
    if found is None:
        return problems, ["README.md has no lineage section; something wrote it after the lineage"]
    if found != expected:
        problems.insert(0, Problem("tampered", "README.md", "its lineage section is not what the record says"))
    return problems, []


def _entries(items: Any) -> dict[str, tuple[str, int]] | None:
    """Return name to digest and size, or None where an entry is malformed or its path leaves the directory."""
    entries: dict[str, tuple[str, int]] = {}
    for item in items:
        if not isinstance(item, Mapping) or set(item) != {"path", "sha256", "size"} or item["path"] in entries:
            return None
        path = item["path"]
        if not isinstance(path, str) or not path or "\\" in path or path.startswith("/") or "\0" in path:
            return None
        if any(part in ("", ".", "..") for part in path.split("/")):
            return None
        entries[path] = (item["sha256"], item["size"])
    return entries
