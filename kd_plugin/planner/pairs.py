"""Whether training would take a teacher beside a student: its tokens and its terms, as far as a plan can look.

A plan asks no network. Tokens are compared where both models have a tokenizer beside their config.json, or are known
by name; terms are read from a model's directory, or from the registry of repositories whose terms were read. The rest
is said to be unchecked, since training will check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from kd_plugin.errors import VocabularyError
from kd_plugin.lineage.discovery import discover
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Graph
from kd_plugin.lineage.policy import evaluate
from kd_plugin.lineage.registry import default_registry
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.verdict import Student
from kd_plugin.planner.architectures import hub_id, known_tokenizer
from kd_plugin.vocab import Vocabulary

Answer = Literal["yes", "no", "not checked"]


@dataclass(frozen=True)
class Pair:
    """A student and one of its teachers.

    Attributes:
        teacher: as the user named it.
        tokens: whether its token ids mean the student's tokens.
        tokens_because: why, in a few words.
        terms: whether its terms and the student's let the student be trained on its distributions.
        terms_because: why, in a few words.
    """

    teacher: str
    tokens: Answer
    tokens_because: str
    terms: Answer
    terms_because: str

    @property
    def refused(self) -> bool:
        """Whether training would refuse it."""
        return "no" in (self.tokens, self.terms)

    def __str__(self) -> str:
        """Say both in a line."""
        answers = {"yes": "", "no": "REFUSED: ", "not checked": "not checked: "}
        return (
            f"{self.teacher}: tokens {answers[self.tokens]}{self.tokens_because}; terms "
            f"{answers[self.terms]}{self.terms_because}."
        )


def pairs(student: str, teachers: Sequence[str]) -> list[Pair]:
    """Look at each of ``teachers`` beside ``student``, all as a plan names them; no weights, no network."""
    return [Pair(teacher, *_tokens(student, teacher), *_terms(student, teacher)) for teacher in teachers]


def _tokens(student: str, teacher: str) -> tuple[Answer, str]:
    mine, theirs = known_tokenizer(student), known_tokenizer(teacher)
    if mine is not None and theirs is not None:
        if mine == theirs:
            return "yes", f"are the student's ({mine})"
        if mine.split("/")[0] != theirs.split("/")[0]:
            return "no", f"are of {theirs}, the student's of {mine}"
        return "not checked", f"are of {theirs}, the student's of {mine}, whose special tokens may differ"
    own, other = _vocabulary(student), _vocabulary(teacher)
    if own is None or other is None:
        lacking = " and ".join(name for name, found in ((student, own), (teacher, other)) if found is None)
        return "not checked", f"no tokenizer here of {lacking}"
    try:
        own.require_same_tokens(other, "student", "teacher")
    except VocabularyError as error:
        return "no", str(error).split(". Distributions")[0]
    return "yes", "are the student's"


def _vocabulary(name: str) -> Vocabulary | None:
    directory = _directory(name)
    if directory is None or not any((directory / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return Vocabulary.from_tokenizer(AutoTokenizer.from_pretrained(directory))
    except (ValueError, OSError, ImportError):
        return None  # of a kind that this environment cannot build: the answer is that it was not checked


def _directory(name: str) -> Path | None:
    """Return the model's directory, as an absolute path, which nothing takes for a hub id."""
    path = Path(name).resolve()
    if hub_id(name) is not None or not path.exists():
        return None
    return path if path.is_dir() else path.parent


def _terms(student: str, teacher: str) -> tuple[Answer, str]:
    """Judge the two models as the gate before training does, with nothing declared."""
    registry = default_registry()
    edges, graphs, names = [], [], []
    kinds: tuple[tuple[str, EdgeKind], ...] = ((student, "initialized_from"), (teacher, "distilled_logits"))
    for model, kind in kinds:
        sources = _sources(model)
        if not sources:
            return "not checked", f"{model} is not known here"
        for source in sources:
            found = discover(source, registry)
            edges.append(Edge(SELF, found.node.id, kind, source.name))
            graphs.append(found.graph)
            names.append(", ".join(found.node.licenses))
    graph = Graph.of([], edges).merged(*graphs)
    verdict = evaluate(graph, registry.terms, {}, Student(), (), datetime.now(UTC).date().isoformat())
    blocked = [finding for finding in verdict.refusals if finding.severity == "block"]
    if blocked:
        return "no", f"{blocked[0].subject}: {blocked[0].clause.rstrip('.')}"
    asked = [f for f in verdict.findings if f.trigger == "training" and f.severity in ("unknown", "conditional")]
    if asked:
        return "not checked", f"{asked[0].subject} asks for a word under `lineage` ({asked[0].clause.split(':')[0]})"
    return "yes", f"allow it ({', '.join(dict.fromkeys(names))})"


def _sources(model: str) -> list[Source]:
    """Return what discovery reads without a network: a directory, or a repository whose terms were read and its bases.

    A base is named as a source of its own, because discovery would ask the hub for it.
    """
    found, registry = [], default_registry()
    known = registry.known_repository(hub_id(model))
    while known is not None:
        found.append(Source(name=known.repo, license=known.license))
        if known.base is None:
            return found
        known = registry.known_repository(known.base)
        if known is None:
            return []  # whose terms were not all read
    directory = _directory(model)
    return [] if directory is None else [Source(name=model, ref=str(directory))]
