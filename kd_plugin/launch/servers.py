"""Whether the servers that a run's YAML names are there and what it needs: versions, flags, parity, bytes a second.

Nothing is trained or loaded but what a handshake compares; the weights of an engine are left as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

import requests

from kd_plugin.errors import KDError
from kd_plugin.inputs import read_yaml
from kd_plugin.panel.block import panel_from_block
from kd_plugin.rollouts.vllm.settings import EngineSettings, engine_settings
from kd_plugin.rollouts.vllm.transfer import NEEDS as TRANSFER_NEEDS
from kd_plugin.teachers.base import reach

_VERSION = (0, 32)
_SECONDS = 10
# What each way to take weights there needs, and the route that a server has only with it
_NEEDS = {
    "adapter": ("/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"),
    "reload": ("/collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
    "nccl": ("/init_weight_transfer_engine", TRANSFER_NEEDS),
}


def server_problems(training: str | Path, least_rate: float = 0.0) -> tuple[list[str], list[str]]:
    """Ask the engines and the teachers' servers of a run's YAML.

    Args:
        training: with ``panel``, ``rollout_engine`` or both, as a training takes it.
        least_rate: bytes a second that each server of hidden states must deliver; 0 measures and asks for none.

    Returns:
        The problems, each with its way out, and what was measured.
    """
    content = read_yaml(Path(training))
    problems: list[str] = []
    notes: list[str] = []
    try:
        engine = engine_settings(content.get("rollout_engine"))
        problems += [] if engine is None else engine_problems(engine)
        panel = panel_from_block(content["panel"]) if content.get("panel") else None
    except KDError as error:
        return [*problems, str(error)], notes
    for name, teacher in ({} if panel is None else panel.teachers).items():
        rate = getattr(teacher, "bytes_per_second", None)
        try:
            reach(teacher)
            found = None if rate is None else rate()
        except KDError as error:
            problems.append(f"teacher {name!r}: {error}")
            continue
        if found is not None:
            notes.append(f"teacher {name!r}: {found / 1e9:.3f} GB/s of hidden states, computed and sent")
            if found < least_rate:
                problems.append(
                    f"teacher {name!r} delivers {found / 1e9:.3f} GB/s of hidden states, {least_rate / 1e9:g} are "
                    "needed; use more GPUs for it, several servers, or a faster network"
                )
    return problems, notes


def engine_problems(engine: EngineSettings) -> list[str]:
    """Check that each engine answers, is recent enough, and has the route that takes weights."""
    route, flags = _NEEDS[engine.sync]
    found = []
    for url in engine.addresses:
        root = url.rstrip("/").removesuffix("/v1")
        try:
            told = str(requests.get(f"{root}/version", timeout=_SECONDS).json()["version"])
            status = requests.get(root + route, timeout=_SECONDS).status_code
        except (requests.RequestException, ValueError, KeyError) as error:
            found.append(f"the rollout engine {url} does not answer as vLLM does: {type(error).__name__}")
            continue
        version = tuple(int(part) for part in re.findall(r"\d+", told)[:2])
        if version < _VERSION:
            found.append(f"the rollout engine {url} is vLLM {told}; 0.32 or later is needed")
        if status == 404:  # a route that is there refuses GET with 405
            found.append(f"the rollout engine {url} takes no weights by sync: {engine.sync}; start it with {flags}")
    return found
