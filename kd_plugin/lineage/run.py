"""A run's lineage: gated before training, written at every save."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_plugin.errors import LineageError
from kd_plugin.lineage import hashing, shipping
from kd_plugin.lineage.card import update_card
from kd_plugin.lineage.config import LineageConfig, load_config
from kd_plugin.lineage.declared import (
    Declared,
    match_datasets,
    match_outputs,
    match_teachers,
    not_cached,
    registry_of,
    remedy_of,
    shipped_student,
)
from kd_plugin.lineage.discovery import Found, checkpoint_node, discover, record_overrides, with_weights
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Graph
from kd_plugin.lineage.policy import RULES, evaluate
from kd_plugin.lineage.proof import Proofs, subjects_of
from kd_plugin.lineage.record import (
    RECORD,
    SCHEMA,
    alone,
    copy_lineage,
    installed_versions,
    lineage_directory,
    link_to,
    load_record,
    place_files,
    place_record,
    retract,
    sealed,
)
from kd_plugin.lineage.registry import Registry
from kd_plugin.lineage.shipping import bom_text
from kd_plugin.lineage.sources import Source, Terms, captured_views
from kd_plugin.lineage.verdict import NO_ADVICE, Finding, Override, Verdict, in_force, refuse

logger = logging.getLogger(__name__)


class RunLineage:
    """What a training run learns from, checked once and written beside every checkpoint.

    Args:
        method: ``offline_kd``, ``teacher_panel``, ``sft``, or any trainer's name.
        student: what the student's weights start from.
        teachers: who teaches it directly.
        outputs: teacher caches, each with its ``record``.
        datasets: what else it is trained on.
        config: the user's ``lineage`` field: a mapping, or the path of a YAML file.
        config_hash: digest of the trainer's configuration.
        resume_from: checkpoint directory of the run that this one continues.

    Raises:
        ConfigError: the declarations are malformed, or name a teacher that the run does not have.
        LineageError: a parent's or a cache's record is damaged.
    """

    def __init__(
        self,
        *,
        method: str,
        student: Source,
        teachers: Sequence[Source] = (),
        outputs: Sequence[Source] = (),
        datasets: Sequence[Source] = (),
        config: Mapping[str, Any] | str | Path | None = None,
        config_hash: str | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.method = method
        self.config: LineageConfig = load_config(config)
        self.registry: Registry = registry_of(self.config)
        self.config_hash = config_hash
        self.student = Declared.of(student, self.config.student)
        self.outputs, self._answered = match_outputs(outputs, self.config)
        self.teachers = match_teachers(teachers, self.config, self._answered)
        self._given_datasets = not_cached(datasets, self.outputs)
        self.datasets = match_datasets(self._given_datasets, self.config, self._answered)
        self.resumed: Mapping[str, Any] | None = None
        self._resumed_name, self.changes, self._measured = "", list[str](), dict[int, Mapping[str, Any]]()
        # What teachers read and were asked by: views, those of captures among them, and templates
        self.noted: dict[str, Mapping[str, Any]] = {"views": captured_views(self.outputs)}
        self.run_id: str = self.config.run.get("id") or uuid.uuid4().hex
        self.started: str = self.config.run.get("date") or datetime.now(UTC).date().isoformat()
        self._proofs = Proofs(may_wait=True)
        self._roots = self._discover()
        self._warned: set[Finding] = set()
        if resume_from is not None:
            self.resume(resume_from)

    def resume(self, checkpoint: str | Path) -> None:
        """Go on with the run that wrote ``checkpoint``: keep its id and date, or those configured, and chain to it.

        Raises:
            LineageError: the checkpoint's record is missing or damaged.
        """
        self.resumed = load_record(checkpoint)
        self._resumed_name = Path(checkpoint).resolve().name
        self.run_id = self.config.run.get("id") or self.resumed["run"]["id"]
        self.started = self.config.run.get("date") or self.resumed["run"]["date"]
        self.note_changes([str(change) for change in self.resumed["run"].get("changes", ())])
        self._forget_verdict()

    def settle(self) -> None:
        """Wait for what is hashed in the background, and check again where a record was not about its weights.

        A large parent is hashed while models are loaded; call this before the first batch.

        Raises:
            LicenseRefusedError: nothing is known any more of a source that training rests on.
        """
        if not self._proofs.settle():
            self._proofs.may_wait = False  # all of it is hashed by now
            self._rediscover()
            self.require_trainable()

    def add_datasets(self, datasets: Sequence[Source]) -> None:
        """Take in what a trainer turns out to train on, and check again; raises LicenseRefusedError."""
        known = {one.ref for one in self._given_datasets}
        new = [one for one in not_cached(datasets, self.outputs) if one.ref not in known]
        if new:
            self._given_datasets += new
            self.datasets = match_datasets(self._given_datasets, self.config, self._answered)
            self._rediscover()
        self.require_trainable()

    def adopt(self, record: Mapping[str, Any]) -> None:
        """Start from a model in memory that another run made, whose record this is, and check again.

        Raises:
            LicenseRefusedError: what it was made from may not be trained on under these declarations.
        """
        if (self.student.source.record or {}).get("digest") != record["digest"]:
            self.student = replace(self.student, source=replace(self.student.source, record=record))
            self._rediscover()
        self.require_trainable()

    def admit(self, teacher: str, served: Sequence[str]) -> None:
        """Check a teacher again by the names that its server gives; to be called before the first prompt is sent.

        Args:
            teacher: the run's name of it.
            served: names that the server gives for the model.

        Raises:
            LicenseRefusedError: what is served may not teach.
        """
        names = tuple(dict.fromkeys(served))
        for i, one in enumerate(self.teachers):
            if one.source.name == teacher and one.source.served != names:
                self.teachers[i] = replace(one, source=replace(one.source, served=names))
                self._rediscover()
        self.require_trainable()

    def _rediscover(self) -> None:
        self._roots = self._discover()
        self._forget_verdict()

    def _forget_verdict(self) -> None:
        for name in ("graph", "verdict", "_recorded_graph"):
            self.__dict__.pop(name, None)

    def note_changes(self, changes: Sequence[str]) -> None:
        """Record that the run went on under other conditions than it began with, such as another panel."""
        self.changes += [change for change in changes if change not in self.changes]

    def note_evaluation(self, step: int, tasks: Mapping[str, Any]) -> None:
        """Record what the weights after ``step`` steps reached: by task ``pass@1`` and how it was asked."""
        self._measured[step] = tasks

    @cached_property
    def graph(self) -> Graph:
        """The lineage, without digests of local weights: cheap enough for a gate."""
        return self._graph_of(self._roots)

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict under the declared facts, today. Reads files and declarations only."""
        return self._evaluated(self.graph, self.config.use, self._overrides_in_force)

    def require_trainable(self, *, shown: bool = False) -> None:
        """Refuse to train where the terms of a source forbid it, or nothing is known of them.

        What else stands in the way of distribution, or should be known, is logged once, by the first rank of several.

        Args:
            shown: the caller has shown the findings, and nothing is logged.

        Raises:
            LicenseRefusedError: names every source, clause and piece of evidence, and the way out.
        """
        refuse(self.verdict.refusals, "Training is refused by the terms of its sources", self._remedy)
        for finding in self.verdict.findings:
            if finding not in self._warned and not shown and os.environ.get("RANK", "0") == "0":
                logger.warning("license lineage: %s: %s", finding.severity, finding)
        self._warned |= set(self.verdict.findings)

    def require_publishable(self, directory: str | Path | None = None) -> None:
        """Refuse to publish a checkpoint whose lineage is unfinished or whose terms forbid distribution.

        Publishing is distribution, whatever ``use.distribute`` says.

        Args:
            directory: the checkpoint; None asks only whether the terms allow it.

        Raises:
            LicenseRefusedError: the terms forbid it, or a duty that distribution brings is not met.
            LineageError: ``lineage.json`` is missing or damaged.
        """
        if directory is not None:
            load_record(directory)
        verdict = self._evaluated(self.graph, {**self.config.use, "distribute": True}, self._overrides_in_force)
        refuse(verdict.publication_stops, "Publishing is refused by the terms of the sources", self._remedy)

    def write(self, directory: str | Path, *, step: int, parent: str | Path | None = None) -> None:
        """Write ``LICENSES/``, ``NOTICE``, ``bom.cdx.json``, the card and, last, ``lineage.json`` beside the weights.

        Args:
            directory: a directory that holds a checkpoint's weights, or a checkpoint of a single file, whose
                lineage lies beside it; see :func:`~kd_plugin.lineage.record.lineage_directory`.
            step: optimizer steps done.
            parent: directory of the checkpoint before this one, to whose digest this one is chained.

        Raises:
            LineageError: there are no weights, or the directory is not writable. The weights stay as they are,
                and the record is absent.
        """
        self.settle()
        weights, directory = Path(directory), lineage_directory(directory)
        if not weights.exists():
            raise LineageError(f"{str(weights)!r} is not there; lineage is written beside weights that are there.")
        directory.mkdir(exist_ok=True)
        with alone(directory):
            self._place(weights, directory, step, parent)

    def _place(self, weights: Path, directory: Path, step: int, parent: str | Path | None) -> None:
        stale = retract(directory)
        subjects = subjects_of(weights)
        if not subjects:
            raise LineageError(f"{str(weights)!r} holds no weight files; lineage is written after the weights.")
        record, terms, verdict = self._content(step, parent, subjects)
        graph = self._recorded_graph
        record["files"] = place_files(
            directory,
            shipping.notice_text(graph, terms, verdict),
            bom_text(record),
            shipping.license_files(graph, terms, self.registry),
            stale,
        )
        update_card(directory, record)
        saved_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        place_record(directory, sealed(record, saved_at))

    def summary(self, *, step: int, parent: str | Path | None = None) -> dict[str, Any]:
        """Return what :meth:`write` records, less the digests of weights and files: for inside a checkpoint.

        Args:
            step: optimizer steps done.
            parent: directory of the checkpoint before this one.
        """
        record, _, _ = self._content(step, parent, ())
        return {key: value for key, value in record.items() if key != "subjects"}

    def _content(
        self, step: int, parent: str | Path | None, subjects: Sequence[hashing.Subject]
    ) -> tuple[dict[str, Any], dict[str, Terms], Verdict]:
        """Build the record of a checkpoint, before its files are placed."""
        graph = self._recorded_graph
        named = {i for node in graph.nodes.values() for i in (*node.licenses, *node.services)}
        student = shipped_student(self.config, self.registry)
        terms = {i: self.registry.terms[i] for i in sorted(named | set(student.declared_license))}
        verdict = self._evaluated(graph, self.config.use, self._overrides)
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "disclaimer": NO_ADVICE,
            "run": self._run_section(),
            "checkpoint": {"step": step, "parent": self._parent(parent)},
            **({"evaluation": self._measured[step]} if step in self._measured else {}),
            "subjects": [{"path": s.path, "sha256": s.sha256, "size": s.size} for s in subjects],
            **graph.to_json(),
            "terms": {i: entry.to_json() for i, entry in terms.items()},
            "policy": {
                "id": "kd-plugin",
                "version": self.registry.version,
                "sha256": self.registry.sha256,
                "rules": RULES,
                "facts": dict(sorted(self.config.use.items())),
            },
            "student": {"name": student.name, "declared_license": list(student.declared_license)},
            "effective": verdict.to_json(),
            "overrides": [one.to_json() for one in self._overrides],
        }
        return record, terms, verdict

    def covers(self, directory: str | Path) -> bool:
        """Whether this run's record in ``directory`` names every weight file there, by name and size."""
        weights = Path(directory)
        if not (lineage_directory(weights) / RECORD).is_file():
            return False
        record = load_record(weights)
        there = {hashing.name_in(weights, p): p.stat().st_size for p in hashing.weight_files(weights)}
        return record["run"]["id"] == self.run_id and there == {s["path"]: s["size"] for s in record["subjects"]}

    def copy_files(self, checkpoint: str | Path, directory: str | Path) -> None:
        """Copy a checkpoint's lineage files to where its weights are copied: the record last.

        Raises:
            LineageError: the checkpoint's record is missing or damaged, or ``directory`` is not writable.
        """
        record = load_record(checkpoint)
        with alone(Path(directory)):
            copy_lineage(Path(checkpoint), record, Path(directory))
            update_card(Path(directory), record)

    @cached_property
    def _recorded_graph(self) -> Graph:
        """The lineage with digests of local weights, which are hashed at the first save."""
        hashed = []
        for (edge, found), source in zip(self._roots, self._sources, strict=True):
            one = with_weights(found, source)
            hashed.append((replace(edge, target=one.node.id), one))
        return self._graph_of(hashed)

    @property
    def _overrides(self) -> tuple[Override, ...]:
        """The user's exceptions and those that ancestors were made under."""
        inherited = [one for _, found in self._roots for one in found.overrides]
        resumed = record_overrides(self.resumed) if self.resumed is not None else ()
        return tuple(sorted({*self.config.overrides, *inherited, *resumed}))

    @property
    def _overrides_in_force(self) -> tuple[Override, ...]:
        """Those that hold today: a run that gives itself another date does not stretch an exception."""
        return in_force(self._overrides, datetime.now(UTC).date().isoformat())

    def _evaluated(self, graph: Graph, facts: Mapping[str, bool], overrides: tuple[Override, ...]) -> Verdict:
        student = shipped_student(self.config, self.registry)
        verdict = evaluate(graph, self.registry.terms, facts, student, overrides, self.started)
        return shipping.settle(verdict, graph, self.registry.terms)

    def _discover(self) -> list[tuple[Edge, Found]]:
        """Find every source; edges start at ``self``."""
        text_edge: EdgeKind = "corrected_by" if self.method == "teacher_panel" else "trained_on_outputs"
        wanted: list[tuple[Declared, EdgeKind]] = [(self.student, "initialized_from")]
        wanted += [(Declared(parent), "merged_from") for parent in self.config.student.merged_from]
        wanted += [(t, "distilled_logits" if t.source.signal == "logits" else text_edge) for t in self.teachers]
        wanted += [
            (Declared(o), "distilled_logits" if o.signal == "logits" else "trained_on_outputs") for o in self.outputs
        ]
        wanted += [(d, "trained_on") for d in self.datasets]
        self._sources = [declared.source for declared, _ in wanted]
        found = [
            (discover(d.source, self.registry, repo=d.repo, proofs=self._proofs), kind, d.source.name)
            for d, kind in wanted
        ]
        return [(Edge(SELF, one.node.id, kind, name), one) for one, kind, name in found]

    def _graph_of(self, roots: list[tuple[Edge, Found]]) -> Graph:
        graph = Graph.of([], [edge for edge, _ in roots]).merged(*(found.graph for _, found in roots))
        if self.resumed is None:
            return graph
        node = checkpoint_node(self.resumed, self._resumed_name)
        before = Graph.from_json(self.resumed).rooted_at(node)
        return graph.merged(before, Graph.of([], [Edge(SELF, node.id, "resumed_from")]))

    def _remedy(self, finding: Finding) -> str:
        return remedy_of(finding, self._roots, self.graph, self.registry)

    def _parent(self, parent: str | Path | None) -> dict[str, Any] | None:
        if parent is not None:
            return link_to(load_record(parent), Path(parent).resolve().name)
        return None if self.resumed is None else link_to(self.resumed, self._resumed_name)

    def _run_section(self) -> dict[str, Any]:
        run = self.config.run
        return {
            "id": self.run_id,
            "date": self.started,
            "method": self.method,
            "source": {"repo": run.get("repo"), "commit": run.get("commit")},
            "config_hash": self.config_hash,
            "versions": installed_versions(),
            **({"changes": list(self.changes)} if self.changes else {}),
            **{name: dict(entries) for name, entries in self.noted.items() if entries},
        }
