"""The run that a plan is made for, and the machines that it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from kd_plugin.divergence.modes import MODES, Combine
from kd_plugin.divergence.spec import NAMES as DIVERGENCES
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.planner.architectures import Architecture, architecture

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
    def judged_by_all(self) -> bool:
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
