"""Whether the servers that a run's YAML names are there and what it needs: versions, flags, parity, bytes a second.

Nothing is trained, and of weights only small checkpoints are loaded, to be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugin.errors import KDError
from kd_plugin.inputs import read_yaml
from kd_plugin.launch.engines import Student, base_problems, engine_problems
from kd_plugin.panel.block import panel_from_block
from kd_plugin.rollouts.vllm.settings import EngineSettings, engine_settings
from kd_plugin.teachers.base import reach


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
            problems, notes = _of_engines(engine, Student.of(content))
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


def _of_engines(engine: EngineSettings, student: Student | None) -> tuple[list[str], list[str]]:
    problems = engine_problems(engine)
    if problems or not engine.addresses:
        return problems, []
    if student is None:
        return [], ["the YAML names no student (model_name_or_path), so what the rollout engines serve is not compared"]
    return base_problems(engine, student)
