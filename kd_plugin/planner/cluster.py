"""The machines that a plan is made for, and what their parts do in a second."""

from __future__ import annotations

from dataclasses import dataclass

from kd_plugin.errors import ConfigError
from kd_plugin.planner.run import GIB


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
