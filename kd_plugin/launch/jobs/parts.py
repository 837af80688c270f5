"""The parts of a panel on a cluster: engines that generate for the student, teachers on servers, and trainers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import hub_id
from kd_plugin.planner.run import Cluster, PlannedRun
from kd_plugin.planner.time import ENGINE_GPUS, Engines
from kd_plugin.rollouts.vllm.jobs import vllm_rank
from kd_plugin.teachers.hidden.states import FLAGS


@dataclass(frozen=True)
class Server:
    """A vLLM server.

    Attributes:
        name: of the part: lower-case letters, digits and hyphens.
        says: what it gives: ``rollouts``, ``hidden`` or ``listed``.
        model: that it serves; None where whoever starts it names the model.
        flags: further ones of ``vllm serve``.
        nodes: over which it is spread.
    """

    name: str
    says: str
    model: str | None = None
    flags: str = ""
    nodes: int = 1

    @property
    def variable(self) -> str:
        """Its name in a shell."""
        return self.name.upper().replace("-", "_")

    @property
    def all_flags(self) -> str:
        """Those that what it gives needs, and its own."""
        own = {"rollouts": "", "hidden": FLAGS, "listed": "--max-logprobs 64"}[self.says]
        return f"{own} {self.flags}".strip()


@dataclass(frozen=True)
class Parts:
    """All that is started.

    Attributes:
        servers: in the order in which they start; trainers start when all are healthy.
        trainers: nodes that train.
        gpus: of a node.
        sync: how the student's weights reach its engines.
        max_staleness: optimizer steps that these may be ahead.
        deepspeed: configuration of the trainers.
        arguments: further ones of the training command.
    """

    servers: tuple[Server, ...]
    trainers: int
    gpus: int = 8
    sync: str = "reload"
    max_staleness: int = 1
    deepspeed: str = "integrations/deepspeed/zero3.json"
    arguments: str = ""

    @property
    def nodes(self) -> int:
        """Of all parts."""
        return self.trainers + sum(server.nodes for server in self.servers)

    def of(self, *says: str) -> list[Server]:
        """Return the servers that give one of these."""
        return [server for server in self.servers if server.says in says]

    def settings(self, address: Callable[[Server], str], directory: str | None = None) -> str:
        """Return what the training's YAML says of the servers, as comments.

        Args:
            address: of a server.
            directory: through which the student's weights go; None for that in the output directory.
        """
        engines = [f'"{address(one)}"' for one in self.of("rollouts")]
        where = f"url: {engines[0]}" if len(engines) == 1 else f"urls: [{', '.join(engines)}]"
        shared = "" if directory is None else f", directory: {directory}"
        lines = [
            "rollout_engine:",
            f"  {{kind: vllm, {where}, sync: {self.sync}, max_staleness: {self.max_staleness}{shared}}}",
        ]
        teachers = self.of("hidden", "listed")
        if teachers:
            lines += ["panel:", "  teachers:"]
        for one in teachers:
            how = "signal: hidden" if one.says == "hidden" else "estimator: topk_tail"
            repo = one.model or "..."
            lines.append(f'    {one.name}: {{kind: server, {how}, url: "{address(one)}", repo: {repo}}}')
        return "".join(f"#   {line}\n" for line in lines)


def parts_of(
    run: PlannedRun, cluster: Cluster, beside: Engines, *, lora_rank: int, deepspeed: str, arguments: str
) -> Parts:
    """Return the parts of a planned run.

    The GPUs of servers are shared evenly by the teachers that are placed on one, and these give hidden states.

    Args:
        run: of the trainers.
        cluster: they train on; the other parts have nodes of the same size.
        beside: GPUs of the other parts.
        lora_rank: of the student's adapter; 0 where all of it trains.
        deepspeed: path of the trainers' configuration.
        arguments: further ones of the training command.

    Raises:
        ConfigError: GPUs that make no whole nodes, or servers without a teacher that is placed on one.
    """
    teachers = [one for one in run.teachers if one.placement == "server"] if beside.server_gpus else []
    if beside.server_gpus and not teachers:
        raise ConfigError(
            "server_gpus is set, and no teacher is placed on a server. Name one: --teachers [MODEL:server]"
        )
    each = beside.server_gpus // max(len(teachers), 1)
    most = run.prompt_length + run.completion_length
    servers = [
        Server(name, "hidden", _model(teacher.name), f"--max-model-len {most}", _nodes(each, cluster, teacher.name))
        for teacher, name in zip(teachers, _names([one.name for one in teachers]), strict=True)
    ]
    count = beside.student_gpus // ENGINE_GPUS
    flags = f"--max-model-len {most}"
    if lora_rank:
        flags += f" --enable-lora --max-lora-rank {vllm_rank(lora_rank)}"
    nodes = _nodes(ENGINE_GPUS, cluster, "an engine")
    for number in range(1, count + 1):
        name = "engine" if count == 1 else f"engine-{number}"
        servers.append(Server(name, "rollouts", _model(run.student.name), flags, nodes))
    sync = "adapter" if lora_rank else "reload"
    return Parts(tuple(servers), cluster.nodes, cluster.gpus_per_node, sync, beside.staleness, deepspeed, arguments)


def _nodes(gpus: int, cluster: Cluster, what: str) -> int:
    """Return how many nodes a server takes."""
    if gpus % cluster.gpus_per_node:
        raise ConfigError(
            f"{what} would be served by {gpus} GPUs, and a node has {cluster.gpus_per_node}: it takes whole nodes. Set "
            "server_gpus to a multiple for each teacher on a server, or gpus_per_node."
        )
    return gpus // cluster.gpus_per_node


def _names(models: Sequence[str]) -> list[str]:
    """Return a name of a part for each model; the same model twice has two."""
    names: list[str] = []
    for model in models:
        stem = re.sub(r"[^a-z0-9]+", "-", model.rpartition("/")[2].lower()).strip("-")[:40] or "teacher"
        same = sum(name == stem or name.startswith(f"{stem}-copy") for name in names)
        names.append(stem if not same else f"{stem}-copy{same}")
    return names


def _model(name: str) -> str | None:
    """Return where a model's weights are, as far as its name says it."""
    if Path(name, "config.json").is_file():
        return str(Path(name).resolve())
    return hub_id(name) or (name if name.count("/") == 1 and not name.endswith(".json") else None)
