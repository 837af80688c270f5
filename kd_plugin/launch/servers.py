"""Whether the servers that a run's YAML names are there and what it needs, asked before there is a trainer.

Of an engine that generates for the student: that it answers, is recent enough, has the route that takes weights, takes
rows of the run's length, and serves the student's base in the student's dtype. Of a teacher's server: parity with its
checkpoint, and bytes a second. Nothing is trained, an engine's weights are left as they are, and of weights only small
checkpoints are loaded, to be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

from kd_plugin.errors import KDError
from kd_plugin.inputs import read_yaml
from kd_plugin.models import load_language_model, output_rows
from kd_plugin.panel.block import panel_from_block
from kd_plugin.rollouts.in_process import Sampling
from kd_plugin.rollouts.vllm.parity import COARSE, LISTED, Probe, own_logprobs, rms, tolerated
from kd_plugin.rollouts.vllm.pool import EnginePool
from kd_plugin.rollouts.vllm.settings import EngineSettings, engine_settings
from kd_plugin.rollouts.vllm.transfer import NEEDS as TRANSFER_NEEDS
from kd_plugin.student.head import load_tokenizer
from kd_plugin.teachers.base import reach
from kd_plugin.teachers.hidden import states as hidden_states
from kd_plugin.teachers.hidden.head import Checkpoint
from kd_plugin.vocab import Vocabulary

_VERSION = (0, 32)
_SECONDS = 10
# What each way to take weights there needs, and the route that a server has only with it
_NEEDS = {
    "adapter": ("/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"),
    "reload": ("/collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
    "nccl": ("/init_weight_transfer_engine", TRANSFER_NEEDS),
}


@dataclass(frozen=True)
class NamedStudent:
    """The student that a run starts from, as its YAML names it.

    Attributes:
        reference: a path or hub id; of an adapter's base, where one is trained.
        revision: branch, tag or commit of a hub id.
        dtype: in which it is held.
        response: tokens that a response may have.
    """

    reference: str
    revision: str | None = None
    dtype: str = "float32"
    response: int = Sampling.max_completion_length

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> NamedStudent | None:
        """Read a run's settings; None where they name no student."""
        reference = settings.get("model_name_or_path") or settings.get("model")
        if not isinstance(reference, str):
            return None
        revision = settings.get("model_revision") or settings.get("revision")
        response = settings.get("max_completion_length") or cls.response
        return cls(reference, revision, str(settings.get("dtype") or cls.dtype), int(response))


def server_problems(training: str | Path, least_rate: float = 0.0) -> tuple[list[str], list[str]]:
    """Ask the engines and the teachers' servers of a run's YAML.

    Args:
        training: with ``panel``, ``rollout_engine`` or both, as a training in TRL or in Lightning takes it.
        least_rate: bytes a second that each server of hidden states must deliver; 0 measures and asks for none.

    Returns:
        The problems, each with its way out, and what was measured.
    """
    content = _settings_of(read_yaml(Path(training)))
    problems: list[str] = []
    notes: list[str] = []
    try:
        engine = engine_settings(content.get("rollout_engine"))
        if engine is not None:
            problems, notes = _of_engines(engine, NamedStudent.of(content))
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


def _settings_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a panel: in TRL's YAML at the top, in Lightning's those of the module."""
    module = content.get("model")
    if not isinstance(module, Mapping):
        return content
    own = module.get("init_args", module)
    return own if isinstance(own, Mapping) else {}


def _of_engines(engine: EngineSettings, student: NamedStudent | None) -> tuple[list[str], list[str]]:
    problems = engine_problems(engine)
    if problems or not engine.addresses:
        return problems, []
    if student is None:
        return [], ["the YAML names no student (model_name_or_path), so what the rollout engines serve is not compared"]
    return base_problems(engine, student)


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


def base_problems(engine: EngineSettings, student: NamedStudent) -> tuple[list[str], list[str]]:
    """Check that engines which answer serve the student's base, as the first sync of a run would compare it.

    A small checkpoint is run here on the tokens of the parity probe; of a large one only the names are compared.

    Returns:
        The problems, each with its way out, and what could not be decided.
    """
    problems: list[str] = []
    notes: list[str] = []
    try:
        size = Vocabulary.from_tokenizer(load_tokenizer(student.reference, revision=student.revision)).size
        probe = Probe.of(size)
        mine, rows, allowed = _scored(engine, student, probe)
    except (KDError, OSError, ValueError) as error:
        return [f"the student {student.reference} cannot be read: {error}"], notes
    pool = EnginePool(engine, Sampling(), (), size, rows or size)
    for url in pool.live:
        try:
            served = pool.greet(url)
            theirs = pool.listed(url, probe.prefixes, LISTED)
        except KDError as error:
            problems.append(str(error))
            continue
        where, limit = f"the rollout engine {url}", served.get("max_model_len")
        if limit is not None and int(limit) <= student.response:
            problems.append(
                f"{where} takes {limit} tokens a row, and a response alone may have {student.response}; start it with "
                "--max-model-len of prompt and response together"
            )
        if mine is None:
            notes += _by_name(where, student, served)
            continue
        apart = rms(mine, theirs)
        if apart <= allowed:
            continue
        if engine.sync != "adapter" and apart > COARSE:
            notes.append(
                f"{where} holds other weights than {student.reference} ({apart:.2g} nats apart); the run's first sync "
                "brings its own, if it is the same architecture"
            )
            continue
        problems.append(
            f"{where} does not serve the student's base: the same tokens are {apart:.2g} nats apart (root mean "
            f"square), where {allowed:.2g} is allowed; start it with --model {student.reference} --dtype "
            f"{student.dtype}, or set the run's dtype to that of the engine"
        )
    return problems, notes


def _scored(
    engine: EngineSettings, student: NamedStudent, probe: Probe
) -> tuple[torch.Tensor | None, int | None, float]:
    """Return the student's nats of the probe, None for a large checkpoint; the rows of its head; and the tolerance."""
    checkpoint = Checkpoint(student.reference, student.revision)
    size = checkpoint.bytes
    if size is None or size > hidden_states.RUN_BELOW:
        return None, output_rows(checkpoint.config), 0.0
    model = load_language_model(student.reference, revision=student.revision, dtype=student.dtype)
    allowed = tolerated(engine.tolerance, model.dtype)
    return own_logprobs(model, probe, torch.device("cpu")), output_rows(model), allowed


def _by_name(where: str, student: NamedStudent, served: Mapping[str, Any]) -> list[str]:
    """Say what a server calls a base that is too large to be run here, if its name is another."""
    names = {str(served[key]).rstrip("/").rpartition("/")[2] for key in ("id", "root") if served.get(key)}
    if student.reference.rstrip("/").rpartition("/")[2] in names:
        return []
    return [
        f"{where} says that it serves {', '.join(sorted(names))}, and the student is {student.reference}; it is too "
        "large to be run here, so the first sync compares them"
    ]
