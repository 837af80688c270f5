"""What is said of a recipe before anything runs: the memory of each training stage, by count, and all terms."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kd_plugin.cli.capture import CaptureConfig, make_teacher, rows_of
from kd_plugin.cli.recipe.sections import Recipe, data_of, declarations, is_text, student_of, teacher_of, writers_of
from kd_plugin.cli.recipe.stages import Stage
from kd_plugin.errors import ConfigError, LicenseRefusedError
from kd_plugin.lineage.sources import Source
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.cost import options, recommended
from kd_plugin.planner.memory import Memory
from kd_plugin.planner.run import Cluster, PlannedRun, PlannedTeacher, parse_teacher

_GIB, _MIB = 2**30, 2**20
_PROMPT = 512  # tokens of a prompt, as `kd-plugin plan` takes them; a recipe does not say
_USUAL_GIB = 80.0
_PARTS = ("weights", "gradients", "optimizer", "teachers", "activations", "loss")


def memory_lines(stages: Sequence[Stage], student: str, gpus: int) -> list[str]:
    """Return a line for each training stage: what it takes on a GPU, and under which layout.

    Args:
        stages: of a recipe.
        student: whose shape every stage trains.
        gpus: that train.
    """
    cluster = Cluster(nodes=1, gpus_per_node=gpus, memory_gib=_memory())
    each = "a GPU" if gpus == 1 else f"each of {gpus} GPUs"
    here = "" if _has_gpu() else " (none is here)"
    lines = [f"memory on {each} of {cluster.memory_gib:.0f} GiB{here}, by count; `kd-plugin plan` has all layouts:"]
    for stage in stages:
        if stage.trains:
            try:
                said = _said(planned(stage, student), cluster)
            except (ConfigError, OSError, ValueError) as error:
                said = f"not planned: {' '.join(str(error).split())[:150]}"
            lines.append(f"  {stage.name:<24}{said}")
    return lines if len(lines) > 1 else []


def planned(stage: Stage, student: str) -> PlannedRun:
    """Return what a training stage is for the planner.

    Raises:
        ConfigError: a model whose shape is not known here.
    """
    from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig

    cls = OfflineKDConfig if stage.command == "offline" else TeacherPanelConfig
    usual = {field.name: field.default for field in dataclasses.fields(cls)}
    config: dict[str, Any] = {**usual, **stage.config}
    targets = config.get("lora_target_modules") or ()
    shape = architecture(
        student,
        lora_rank=int(config.get("lora_r", 16)) if config.get("use_peft") else 0,
        lora_targets=(targets,) if isinstance(targets, str) else tuple(targets),
    )
    block: dict[str, Any] = dict(config.get("panel") or {})
    is_panel = stage.command == "panel"
    return PlannedRun(
        student=shape,
        method="panel" if is_panel else "offline",
        teachers=tuple(_teacher(spec) for spec in block["teachers"].values()) if is_panel else (),
        micro_batch=int(config["per_device_train_batch_size"]),
        accumulation=int(config["gradient_accumulation_steps"]),
        prompt_length=_PROMPT if is_panel else 0,
        completion_length=int(config["max_completion_length"] if is_panel else config["max_length"] or _PROMPT),
        precision="fp32" if config["bf16"] is False else "bf16",
        combine=block.get("combine", config.get("combine", "route")),
        divergence=block.get("divergence") or config["divergence"] or "reverse_kl",
        generates=config.get("rollout_engine") is None,
    )


def _teacher(spec: Any) -> PlannedTeacher:
    if isinstance(spec, str):
        return parse_teacher(f"{spec}:resident")
    if "url" in spec or "model" not in spec:
        return PlannedTeacher(str(spec.get("model", "server")), None, "server")
    return parse_teacher(f"{spec['model']}:{'offload' if spec.get('placement') == 'offload' else 'resident'}")


def _said(run: PlannedRun, cluster: Cluster) -> str:
    found = options(run, cluster)
    best = recommended(found)
    option = best or min(found, key=lambda one: one.memory.peak)
    parts = ", ".join(f"{name} {_size(getattr(option.memory, name))}" for name in _largest(option.memory))
    verdict = "fits" if best is not None else f"does not fit: {option.verdict}"
    return f"{_size(option.memory.peak)} with {option.layout.name} ({parts}); {verdict}"


def _largest(memory: Memory) -> list[str]:
    parts = [name for name in _PARTS if getattr(memory, name)]
    return sorted(parts, key=lambda name: -getattr(memory, name))[:3]


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _memory() -> float:
    import torch

    if not _has_gpu():
        return _USUAL_GIB
    return float(torch.cuda.get_device_properties(0).total_memory) / _GIB


def print_verdict(recipe: Recipe) -> bool:
    """Print what the terms of student, teachers and rows allow; return whether training would be refused."""
    from rich.console import Console

    from kd_plugin.lineage import RunLineage
    from kd_plugin.lineage.data import dataset_sources
    from kd_plugin.lineage.show import verdict_lines
    from kd_plugin.lineage.start import student_source

    teachers, rows = _sources(recipe)
    run = RunLineage(
        method="recipe",
        student=student_source(student_of(recipe)),
        teachers=teachers,
        datasets=dataset_sources(rows),
        config=declarations(recipe),
    )
    Console(highlight=False, soft_wrap=True).print(verdict_lines(run.verdict.to_json(), run.graph))
    try:
        run.require_trainable(shown=True)
    except LicenseRefusedError as error:
        print(f"kd-plugin: {error}", file=sys.stderr)
        return True
    return False


def _sources(recipe: Recipe) -> tuple[list[Source], Any]:
    """Return what the teachers are, those that correct by text last, and the rows."""
    if is_text(recipe):
        from kd_plugin.cli.text import TextCaptureConfig, make_writers

        asked = TextCaptureConfig(**{"dataset": "", **data_of(recipe), "teachers": writers_of(recipe)})
        return [writer.source for writer in make_writers(asked)], rows_of(asked) if recipe.data else None
    given = recipe.teachers or {}
    text = {n: one for n, one in given.items() if isinstance(one, Mapping) and one.get("signal") == "text"}
    scoring = [name for name in given if name not in text]
    configs = [CaptureConfig(**{"dataset": "", **data_of(recipe), **teacher_of(recipe, name)}) for name in scoring]
    found = [make_teacher(config).source for config in configs]
    if text:
        from kd_plugin.panel.block import panel_from_block

        block = {**((recipe.panel or {}).get("panel") or {}), "teachers": text}
        found += [teacher.source for teacher in panel_from_block(block).text_teachers.values()]
    return found, rows_of(CaptureConfig(**{"dataset": "", **data_of(recipe)})) if recipe.data else None
