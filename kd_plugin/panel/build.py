"""The panel that a host's arguments and configuration name; the fields are those of ``TeacherPanelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.panel.block import panel_from_block
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.teachers import LocalTeacher

# What a `panel` block, or a TeacherPanel, says itself
_SAID_BY_A_PANEL = ("teacher_weights", "domain_weights", "routes")


def panel_from(teacher_model: Any, teacher_models: Any, args: Any) -> TeacherPanel:
    """Build the panel from whichever of the trainer's arguments and the config's fields names teachers.

    Raises:
        ConfigError: none does, or two do; or settings of how teachers are loaded apply to none.
    """
    if teacher_model is not None and teacher_models is not None:
        raise ConfigError("Both teacher_model and teacher_models are given; name all teachers in teacher_models.")
    chosen = teacher_models if teacher_models is not None else teacher_model
    if chosen is None and args.panel is not None:
        if args.teacher_models:
            raise ConfigError("Both panel and teacher_models are set; name all teachers in panel.")
        chosen = panel_from_block(args.panel)
    if chosen is None:
        chosen = args.teacher_models or args.teacher_model_name_or_path
    _require_teachers_to_load(chosen, args)
    if isinstance(chosen, TeacherPanel):
        for name in _SAID_BY_A_PANEL:
            if getattr(args, name):
                raise ConfigError(
                    f"The panel holds its own {name.removeprefix('teacher_')}; set them there, not in {name}."
                )
        if chosen.divergence is not None and args.divergence is not None:
            raise ConfigError("The panel has a divergence, and so has the configuration; set one of them.")
        return chosen
    if chosen is None:
        raise ConfigError(
            'No teacher is given. Pass teacher_models={"math": "path or hub id", ...} to the trainer, or set '
            "teacher_models or panel in the config."
        )
    if not isinstance(chosen, Mapping):
        chosen = {"teacher": chosen}
    return TeacherPanel(
        {name: _as_teacher(name, teacher, args) for name, teacher in chosen.items()},
        combine=args.combine,  # type: ignore[arg-type]
        weights=args.teacher_weights,  # type: ignore[arg-type]
        domain_weights=args.domain_weights,  # type: ignore[arg-type]
        routes=args.routes,  # type: ignore[arg-type]
        confidence_temperature=args.confidence_temperature,
        estimator=estimator_from(args),
        allow_other_eos=getattr(args, "allow_other_eos", False),
    )


def _require_teachers_to_load(chosen: Any, args: Any) -> None:
    """Refuse settings of how teachers are loaded where none is loaded by them."""
    teachers = chosen.values() if isinstance(chosen, Mapping) else [chosen]
    if chosen is None or any(isinstance(teacher, str) for teacher in teachers):
        return
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"{name} is set, and no teacher is named by a path or hub id that it could apply to: they are loaded "
                "already, or say themselves how. Leave it out, or give it to each teacher, as in LocalTeacher(path, "
                "revision=..., model_init_kwargs={...})."
            )


def estimator_from(args: Any) -> Estimator:
    """Return the estimator that the configuration names."""
    low, high = args.ratio_bounds
    return Estimator(args.estimator, args.top_k_tail, args.student_top_k, (float(low), float(high)))  # type: ignore[arg-type]


def _as_teacher(name: str, teacher: Any, args: Any) -> Any:
    """Load a teacher that is given as a string the way ``DistillationTrainer`` does: float32 unless told."""
    if not isinstance(teacher, str):
        return teacher
    init_kwargs = {"dtype": "float32", **(args.teacher_model_init_kwargs or {})}
    revision = init_kwargs.pop("revision", args.teacher_model_revision)
    return LocalTeacher(
        teacher,
        name=name,
        revision=revision,
        trust_remote_code=args.trust_remote_code,
        model_init_kwargs=init_kwargs,
    )
