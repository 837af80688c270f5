"""The run that a plan is made for: its machines, and whether training would take each teacher beside the student.

A plan asks no network. Tokens are compared where both models have a tokenizer beside their config.json, or are known
by name; terms are read from a model's directory, or from the registry of repositories whose terms were read. The rest
is said to be unchecked, since training will check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from kd_plugin.divergence.modes import MODES, Combine
from kd_plugin.divergence.spec import NAMES as DIVERGENCES
from kd_plugin.errors import ConfigError, VocabularyError, nearest
from kd_plugin.lineage.discovery import discover
from kd_plugin.lineage.graph import SELF, Edge, EdgeKind, Graph
from kd_plugin.lineage.policy import evaluate
from kd_plugin.lineage.registry import default_registry
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.verdict import Student
from kd_plugin.planner.architectures import Architecture, architecture, hub_id, known_tokenizer
from kd_plugin.vocab import Vocabulary

Method = Literal["offline", "panel"]
Placement = Literal["sharded", "resident", "offload", "adapter", "server", "cached"]
Precision = Literal["bf16", "fp32"]
_CHOICES = {
    "method": get_args(Method),
    "combine": tuple(MODES),
    "precision": get_args(Precision),
    "divergence": DIVERGENCES,
}
GIB = 1024**3


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher and where it lives.

    Attributes:
        name: as the user named it.
        shape: its architecture; None for a server or a cache, which take no memory here.
        placement: ``sharded`` over all ranks by ZeRO-3, ``resident`` replicated on each GPU, ``offload`` in host
            memory and moved in one at a time, ``adapter`` on the student's own frozen base, ``server``, ``cached``.
    """

    name: str
    shape: Architecture | None
    placement: Placement


@dataclass(frozen=True)
class PlannedRun:
    """What decides how much memory, compute and communication a run takes.

    Attributes:
        student: the student's shape; its ``trainable`` parameters tell LoRA from a full student.
        method: ``offline`` or ``panel``.
        teachers: those of the panel.
        micro_batch: rows a GPU holds in a forward pass.
        accumulation: micro-batches in an optimizer step.
        prompt_length: tokens of the prompt, or 0 where `completion_length` holds all.
        completion_length: tokens that are trained on in a row.
        precision: ``bf16`` with float32 optimizer states, or ``fp32``.
        combine: how teachers are combined; ``route`` asks one teacher a row, the others ask all.
        divergence: decides which buffers the loss needs.
        listed: target tokens a position, for offline KD.
        generates: whether the student generates on the GPUs that train it, and not on engines beside them.
        gather_for_generation: under ZeRO-3 each GPU holds all weights while the student generates.
    """

    student: Architecture
    method: Method = "panel"
    teachers: tuple[PlannedTeacher, ...] = field(default=())
    micro_batch: int = 1
    accumulation: int = 8
    prompt_length: int = 512
    completion_length: int = 2048
    precision: Precision = "bf16"
    combine: Combine = "route"
    divergence: str = "reverse_kl"
    listed: int = 64
    generates: bool = True
    gather_for_generation: bool = True

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation", "completion_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a whole number of at least 1.")
        if self.prompt_length < 0:
            raise ConfigError(f"prompt_length is {self.prompt_length}; expected 0 or more tokens.")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"Unknown {name} {value!r}; expected one of {', '.join(known)}.{nearest(value, known)}"
                )
        if self.method == "panel" and not self.teachers:
            raise ConfigError(
                "A panel needs a teacher; name at least one, such as --teachers Qwen/Qwen2.5-72B:sharded."
            )

    @property
    def scored_by_all(self) -> bool:
        """Whether every teacher scores every row."""
        return not MODES[self.combine].one_teacher

    @property
    def tokens_in_a_pass(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * (self.prompt_length + self.completion_length)

    @property
    def rows_generated(self) -> int:
        """Rows that a GPU generates and scores at once: a generation batch."""
        return self.micro_batch * self.accumulation

    @property
    def element(self) -> int:
        """Bytes of a weight in the forward pass."""
        return 2 if self.precision == "bf16" else 4

    def placed(self, *placements: Placement) -> list[PlannedTeacher]:
        """Return the teachers of these placements."""
        return [teacher for teacher in self.teachers if teacher.placement in placements]


def parse_teacher(text: str) -> PlannedTeacher:
    """Read ``MODEL:PLACEMENT``, such as ``Qwen/Qwen2.5-72B:sharded``; without a placement it is ``sharded``.

    Raises:
        ConfigError: an unknown placement or model.
    """
    model, _, placement = text.rpartition(":") if ":" in text else (text, "", "sharded")
    if placement not in get_args(Placement):
        known = list(get_args(Placement))
        raise ConfigError(
            f"Unknown placement {placement!r} of teacher {model}; expected one of {', '.join(known)}."
            + nearest(placement, known)
        )
    away = placement in ("server", "cached", "adapter")
    return PlannedTeacher(model, None if away else architecture(model), placement)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them. The speeds' defaults are makers' figures for an H100 SXM node with 400 Gbit/s a GPU.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs in each.
        memory_gib: memory of a GPU.
        reserved: share of it that CUDA, NCCL and fragmentation take.
        host_gib: host memory of a node.
        nvme_gib: local NVMe of a node.
        tflops: dense bf16 peak of a GPU.
        utilization: share of the peak that training reaches.
        memory_bandwidth: bytes a second of a GPU's memory, which bounds generation.
        within: bytes a second that a GPU sends within its node.
        between: bytes a second that a GPU sends to other nodes.
        to_host: bytes a second between a GPU and host memory.
        to_nvme: bytes a second between a node and its NVMe.
        price: of a GPU hour.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    reserved: float = 0.08
    host_gib: float = 1800.0
    nvme_gib: float = 0.0
    tflops: float = 989.0
    utilization: float = 0.4
    memory_bandwidth: float = 3.35e12
    within: float = 400e9
    between: float = 50e9
    to_host: float = 25e9
    to_nvme: float = 5e9
    price: float = 2.5

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.memory_gib <= 0:
            raise ConfigError(f"gpu memory is {self.memory_gib} GiB; expected a positive number.")

    @property
    def ranks(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes of a GPU's memory that a run can fill."""
        return int(self.memory_gib * GIB * (1.0 - self.reserved))

    @property
    def link(self) -> float:
        """Bytes a second at which a ring over all GPUs moves: its slowest link's."""
        return self.within if self.nodes == 1 else self.between

    @property
    def host_share(self) -> int:
        """Bytes of host memory for each GPU, a tenth left to the system."""
        return int(self.host_gib * GIB * 0.9 / self.gpus_per_node)

    @property
    def nvme_share(self) -> int:
        """Bytes of NVMe for each GPU."""
        return int(self.nvme_gib * GIB / self.gpus_per_node)


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
        shared = own.shared_with(other)
    except VocabularyError as error:
        return "no", str(error).split(". Distributions")[0]
    if shared is not None:
        return "yes", f"share {shared.count} ids with the student's; all others are one outcome"
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
    """Check the two models as the gate before training does, with nothing declared."""
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
