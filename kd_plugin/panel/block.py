"""A panel from one block of YAML, or from what a host was given: who is on it, and how they are combined.

A host's fields are those of ``TeacherPanelConfig``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError, nearest, require_known_keys
from kd_plugin.inputs import read_yaml
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.roster import OwnTerms, TeacherPanel
from kd_plugin.panel.text.reward import Reward
from kd_plugin.teachers import KINDS, AdapterTeacher, LocalTeacher
from kd_plugin.text import TEXT_KINDS
from kd_plugin.text.correction import correction_settings
from kd_plugin.views.view import View

_ESTIMATOR_KEYS = ("top_k", "student_top_k", "ratio_bounds", "tau")
_PANEL_KEYS = (
    "teachers",
    "combine",
    "divergence",
    "domain_weights",
    "routes",
    "confidence_temperature",
    "estimator",
    "allow_other_eos",
    "text",
    "reward",
    *_ESTIMATOR_KEYS,
)
_OWN_KEYS = ("kind", "weight", "divergence", "temperature", "estimator", "view", "prices")
# A text teacher's `temperature` is of its sampling, an argument of its class
_OWN_TEXT_KEYS = ("kind", "weight", "signal", "prices")
# TRL loads teachers in float32 unless told, and one teacher must train as it does there
_DEFAULTS = {"dtype": "float32"}
# What a `panel` block, or a TeacherPanel, says itself
_SAID_BY_A_PANEL = ("teacher_weights", "domain_weights", "routes", "text", "reward")


def panel_from_block(block: Mapping[str, Any] | str | Path, where: str = "panel") -> TeacherPanel:
    """Build the panel that a block describes; no weights are loaded.

    Keys: ``combine``, ``divergence`` (a name, or a mapping with ``name``, ``beta``, ``alpha``), ``routes``,
    ``domain_weights``, ``confidence_temperature``, ``estimator``, ``top_k``, ``student_top_k``, ``ratio_bounds``,
    ``tau``, ``allow_other_eos``, and ``teachers``, name to a mapping. A teacher has ``kind`` (``local`` where it is
    left out, ``adapter``, ``server``, ``cached``), ``weight`` (a number or a schedule), ``divergence``,
    ``temperature``, ``estimator`` and ``view`` (a mapping with the attributes of
    :class:`~kd_plugin.views.view.View`) of its own, and the arguments of its class: ``model``, ``adapter`` and
    ``base``, ``url``, ``cache``, ``placement`` and so on. A base is ``student``, a path, the name of a local teacher,
    or a mapping with the arguments of ``LocalTeacher``. With ``signal: text`` a teacher evaluates and corrects by text,
    as ``text`` says (:class:`~kd_plugin.text.correction.CorrectionSettings`). Any teacher may have ``prices``,
    ``{read: X, written: Y}`` of a million tokens. ``reward``
    (:meth:`~kd_plugin.panel.text.reward.Reward.described`) weighs the divergence by a verifier's verdict.

    Args:
        block: the block, or a YAML file that holds it.
        where: how messages call it.

    Raises:
        ConfigError: an unknown key, naming the near one; a missing one; or what the panel or a teacher refuses.
    """
    if isinstance(block, str | Path):
        block, where = _read(Path(block)), str(block)
    _require_keys(block, _PANEL_KEYS, where)
    described = block.get("teachers")
    if not isinstance(described, Mapping) or not described:
        raise ConfigError(f"{where}: expected a mapping 'teachers' from name to teacher.")
    settings: dict[str, Any] = {key: block[key] for key in _ESTIMATOR_KEYS if key in block}
    if "ratio_bounds" in settings:
        settings["ratio_bounds"] = tuple(settings["ratio_bounds"])
    estimator = Estimator(block.get("estimator", "exact"), **settings)
    teachers = _teachers(described, where)
    weights = {name: teacher["weight"] for name, teacher in described.items() if _has(teacher, "weight")}
    return TeacherPanel(
        teachers,
        combine=block.get("combine", "route"),
        weights={name: weights.get(name, 1.0) for name in described} if weights else None,
        domain_weights=block.get("domain_weights"),
        routes=block.get("routes"),
        confidence_temperature=block.get("confidence_temperature", 1.0),
        own={name: _own(teacher, estimator, f"{where}: teacher {name!r}") for name, teacher in described.items()},
        estimator=estimator,
        divergence=_divergence(block.get("divergence"), where),
        allow_other_eos=block.get("allow_other_eos", False),
        text=None if block.get("text") is None else correction_settings(block["text"], f"{where}: text"),
        reward=None if block.get("reward") is None else Reward.described(block["reward"], f"{where}: reward"),
        prices={name: teacher["prices"] for name, teacher in described.items() if _has(teacher, "prices")},
    )


def _teachers(described: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Make the teachers; adapters last, since they may name one of the others as their base."""
    made: dict[str, Any] = {}
    bases: dict[str, LocalTeacher] = {}
    for name, given in described.items():
        spec = {"model": given} if isinstance(given, str) else given
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{where}: teacher {name!r} is {given!r}; expected a path, a hub id or a mapping.")
        label, kind = f"{where}: teacher {name!r}", spec.get("kind", "local")
        by_text = spec.get("signal") == "text"  # another signal is for the class to understand
        kinds = TEXT_KINDS if by_text else KINDS
        if kind not in kinds:
            raise ConfigError(
                f"{label} has kind {kind!r}"
                + (" and signal 'text'" if by_text else "")
                + f"; expected one of {', '.join(kinds)}."
                + nearest(str(kind), list(kinds))
            )
        if kind != "adapter":
            own = _OWN_TEXT_KEYS if by_text else _OWN_KEYS
            made[name] = _make(kinds[kind], spec, label, own, name)
    for name, spec in described.items():
        if isinstance(spec, Mapping) and spec.get("kind") == "adapter":
            label = f"{where}: teacher {name!r}"
            base = _base(spec.get("base", "student"), made, bases, label)
            made[name] = _make(AdapterTeacher, {**spec, "base": base}, label, _OWN_KEYS, name)
    return {name: made[name] for name in described}


def _base(given: Any, made: Mapping[str, Any], bases: dict[str, LocalTeacher], label: str) -> Any:
    """Return an adapter's base, one for all adapters that describe the same."""
    if given == "student":
        return given
    if isinstance(given, str) and given in made:
        return made[given]
    spec = {"model": given} if isinstance(given, str) else given
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{label}: its base is {given!r}; expected 'student', a path, a teacher or a mapping.")
    key = repr(sorted(spec.items(), key=str))
    if key not in bases:
        bases[key] = _make(LocalTeacher, spec, f"{label}, base", (), str(spec.get("model")))
    return bases[key]


def _make(kind: Callable[..., Any], spec: Mapping[str, Any], label: str, extra: Iterable[str], name: str) -> Any:
    """Call a teacher's class with what its mapping says."""
    parameters = inspect.signature(kind).parameters
    takes = [key for key in parameters if key != "name"]
    _require_keys(spec, [*extra, *takes], label)
    missing = [k for k in takes if parameters[k].default is inspect.Parameter.empty and k not in spec]
    if missing:
        raise ConfigError(f"{label}: the key {missing[0]!r} is missing.")
    defaults = {key: value for key, value in _DEFAULTS.items() if key in takes}
    return kind(**{**defaults, **{key: spec[key] for key in takes if key in spec}}, name=name)


def _own(spec: Any, estimator: Estimator, label: str) -> OwnTerms:
    if not isinstance(spec, Mapping):
        return OwnTerms()
    if spec.get("signal") == "text":
        return OwnTerms()
    temperature = spec.get("temperature")
    own = None if spec.get("estimator") is None else replace(estimator, name=spec["estimator"])
    divergence = _divergence(spec.get("divergence"), label)
    view = None if spec.get("view") is None else View.from_block(spec["view"], f"{label}, view")
    try:
        return OwnTerms(divergence, temperature, own, view)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error


def _divergence(given: Any, label: str) -> Divergence | None:
    if given is None:
        return None
    if isinstance(given, str):
        return Divergence(given)
    _require_keys(given, [field.name for field in fields(Divergence)], f"{label}, divergence")
    return Divergence(**given)


def _has(spec: Any, key: str) -> bool:
    return isinstance(spec, Mapping) and key in spec


def _require_keys(given: Any, known: Iterable[str], label: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{label}: expected a mapping, found {type(given).__name__}.")
    require_known_keys(given, list(known), label)


def _read(path: Path) -> Mapping[str, Any]:
    content = read_yaml(path)
    # A file may hold the block alone, or under its own name as in a configuration
    return content["panel"] if set(content) == {"panel"} else content


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
            "No teacher is given. Name one at least: `panel: {teachers: {math: {model: PATH}}}`, or teacher_models, "
            "in the configuration; in Python the trainer takes teacher_models, too."
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
        text=None if args.text is None else correction_settings(args.text),
        reward=None if args.reward is None else Reward.described(args.reward),
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
