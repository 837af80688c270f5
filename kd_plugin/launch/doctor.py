"""What every rank must agree on before a long run: asked on each, compared on all, the odd rank named."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kd_plugin.errors import ConfigError
from kd_plugin.launch.preflight import abandoned_locks
from kd_plugin.launch.servers import server_problems
from kd_plugin.lineage.hashing import sha256_file

logger = logging.getLogger(__name__)
PACKAGES = ("kd-plugin", "torch", "transformers", "trl", "lightning", "accelerate", "deepspeed", "peft", "datasets")


@dataclass(frozen=True)
class LaunchSettings:
    """What to check.

    Attributes:
        output_dir: must be one directory for all ranks; its disk is measured.
        teachers: local directories of teachers, whose files must be equal everywhere.
        caches: teacher caches, whose manifests must be equal everywhere.
        servers: base URLs of vLLM servers that every rank must reach.
        training: YAML of the training, whose rollout engines and teachers' servers are asked for versions, flags and
            parity with the checkpoints; how fast hidden states come is measured.
        server_rate: GB/s at which each server of hidden states must compute and send them; 0 asks for none.
        memory_gib: free memory that each rank needs, as the plan says; 0 asks for none.
        disk_gib: free disk that ``output_dir`` needs.
        plan: what ``kd-plugin plan --json`` printed; the peak of its recommendation stands for ``memory_gib``, three
            checkpoints of the student, with gradients' and optimizer's states, for ``disk_gib``, and with servers the
            hidden states of a step over the seconds that it scores and transfers for ``server_rate``, where those
            are 0.
    """

    output_dir: str = "."
    teachers: Sequence[str] = field(default_factory=list)
    caches: Sequence[str] = field(default_factory=list)
    servers: Sequence[str] = field(default_factory=list)
    training: str = ""
    server_rate: float = 0.0
    memory_gib: float = 0.0
    disk_gib: float = 0.0
    plan: str = ""


def with_plan(settings: LaunchSettings) -> LaunchSettings:
    """Return ``settings`` with what their plan asks for in the place of zeros.

    Raises:
        ConfigError: the plan cannot be read, or nothing in it fits.
    """
    if not settings.plan:
        return settings
    try:
        plan = json.loads(Path(settings.plan).read_text(encoding="utf-8"))
        best = next(option for option in plan["options"] if option["name"] == plan["recommended"])
        memory = best["memory"]["peak"] / 1024**3
        disk = 3 * (2 * plan["student"]["parameters"] + 12 * plan["student"]["trainable"]) / 1024**3
        rate, beside = 0.0, plan.get("engines")
        if beside and beside["hidden_state_bytes"]:
            rate = beside["hidden_state_bytes"] / (beside["seconds"]["score"] + beside["seconds"]["transfer"]) / 1e9
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ConfigError(
            f"{settings.plan} is no plan that fits: {type(error).__name__} {error}. Write one with `kd-plugin plan ... "
            "--json > plan.json`."
        ) from error
    return replace(
        settings,
        memory_gib=settings.memory_gib or memory,
        disk_gib=settings.disk_gib or disk,
        server_rate=settings.server_rate or rate,
    )


def check_launch(settings: LaunchSettings) -> list[str]:
    """Run all checks; every rank of the default process group must call it.

    Returns:
        The problems, the same on every rank; each names the rank and host that it was found on.
    """
    facts: dict[str, Any] = {"host": f"rank {dist.get_rank()} on {socket.gethostname()}"}
    facts["must_agree"] = _must_agree(settings)
    facts["problems"] = own_problems(settings)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    problems = disagreements({g["host"]: g["must_agree"] for g in gathered})
    problems += [f"{g['host']}: {problem}" for g in gathered for problem in g["problems"]]
    return (
        problems + _shared_directory(Path(settings.output_dir), [g["host"] for g in gathered]) + _collectives(gathered)
    )


def disagreements(facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Name each rank whose fact differs from what most ranks say.

    Args:
        facts: rank's name to what it says of each subject.
    """
    found = []
    for subject in dict.fromkeys(name for said in facts.values() for name in said):
        said = {rank: values.get(subject, "absent") for rank, values in facts.items()}
        usual = Counter(said.values()).most_common(1)[0][0]
        found += [
            f"{rank}: {subject} is {value}; most ranks have {usual}" for rank, value in said.items() if value != usual
        ]
    return found


def _must_agree(settings: LaunchSettings) -> dict[str, str]:
    facts = {}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    facts |= {f"teacher {path}": _digest_of_teacher(Path(path)) for path in settings.teachers}
    facts |= {f"cache {path}": _digest_of_file(Path(path) / "manifest.json") for path in settings.caches}
    facts["world size"] = str(dist.get_world_size())
    facts["python"] = platform.python_version()
    facts["CUDA"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _digest_of_teacher(directory: Path) -> str:
    """Hash the small files, and the names and sizes of the weights, which would take long to read on every rank."""
    if not directory.is_dir():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest_of_file(path: Path) -> str:
    return sha256_file(path)[:16] if path.is_file() else "absent"


def own_problems(settings: LaunchSettings) -> list[str]:
    """Check what one rank can see for itself: servers, memory, disk, and locks that killed builds left behind.

    Returns:
        The problems; locks are those of the machine, and told by the first rank on it.
    """
    import requests

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    problems = [str(lock) for lock in abandoned_locks()] if first else []
    for server in settings.servers:
        try:
            requests.get(server.rstrip("/") + "/v1/models", timeout=10).raise_for_status()
        except requests.RequestException as error:
            problems.append(f"the server {server} does not answer: {type(error).__name__}")
    if settings.training and first:
        found, notes = server_problems(settings.training, settings.server_rate * 1e9)
        problems += found
        for note in notes:
            logger.warning(note)
    free = _free_memory() / 1024**3
    if free < settings.memory_gib:
        problems.append(f"{free:.1f} GiB of memory are free, {settings.memory_gib:g} are needed")
    place = Path(settings.output_dir)
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    disk = shutil.disk_usage(existing).free / 1024**3
    if disk < settings.disk_gib:
        problems.append(f"{disk:.1f} GiB of disk are free at {place}, {settings.disk_gib:g} are needed")
    return problems


def _free_memory() -> int:
    """Free bytes of this rank's accelerator; on a CPU machine what the system can hand out."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _shared_directory(directory: Path, hosts: Sequence[str]) -> list[str]:
    """Each rank leaves a file with a name of its own; all must see rank 0's, and rank 0 must see all.

    Nothing is raised between the collectives, where the other ranks would wait for one that failed.
    """
    tag = [f".launch-check-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(tag)
    problem, rank = "", dist.get_rank()
    own = directory / f"{tag[0]}-{rank}"
    for turn in (0, 1):  # rank 0 makes the directory; a rank that still lacks it then is elsewhere
        try:
            if turn == 0 and rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
            elif turn == 1 and not problem and _await([directory], [True])[0]:
                own.touch()
        except OSError as error:
            problem = f"output_dir {directory} cannot be written to: {error.strerror}"
        dist.barrier()
    problems: list[Any] = [None] * len(hosts)
    dist.all_gather_object(problems, problem)
    wanted = [directory / f"{tag[0]}-{other}" for other in range(len(hosts))]
    seen: list[Any] = [None] * len(hosts)
    dist.all_gather_object(seen, _await(wanted, [not p for p in problems]))
    if not problem:  # on a read-only disk even a file that is not there cannot be removed
        own.unlink(missing_ok=True)
    found = []
    for other, host in enumerate(hosts):
        if problems[other]:
            found.append(f"{host}: {problems[other]}")
        elif not problems[0] and not (seen[other][0] and seen[0][other]):
            found.append(f"{host}: output_dir {directory} is not the directory that rank 0 sees; it must be shared")
    return found


def _await(paths: Sequence[Path], written: Sequence[bool], seconds: float = 5.0) -> list[bool]:
    """Return which files are there; a network file system may show a new one only after a while."""
    until = time.monotonic() + seconds
    while True:
        there = [path.exists() for path in paths]
        if all(t or not w for t, w in zip(there, written, strict=True)) or time.monotonic() > until:
            return there
        time.sleep(0.2)


def _collectives(gathered: Sequence[Mapping[str, Any]]) -> list[str]:
    """Run each kind of collective that training uses, and compare its result with what it must be."""
    world, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.full((4,), float(rank), device=device)
    total = float(sum(range(world)))

    def all_reduce() -> bool:
        value = own.clone()
        dist.all_reduce(value)
        return bool((value == total).all())

    def all_gather() -> bool:
        value = torch.empty(4 * world, device=device)
        dist.all_gather_into_tensor(value, own)
        return value.view(world, 4)[:, 0].tolist() == [float(r) for r in range(world)]

    def reduce_scatter() -> bool:
        value = torch.empty(4, device=device)
        dist.reduce_scatter_tensor(value, own.repeat(world))
        return bool((value == total).all())

    def broadcast() -> bool:
        value = own.clone()
        dist.broadcast(value, src=world - 1)
        return bool((value == world - 1).all())

    kinds: list[Callable[[], bool]] = [all_reduce, all_gather, reduce_scatter, broadcast]
    wrong = [kind.__name__ for kind in kinds if not kind()]
    all_wrong: list[Any] = [None] * world
    dist.all_gather_object(all_wrong, wrong)
    return [
        f"{g['host']}: {kind} gave a wrong result"
        for g, kinds in zip(gathered, all_wrong, strict=True)
        for kind in kinds
    ]
