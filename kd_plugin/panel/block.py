"""A panel from one block of YAML: who is on it, how each is reached, and how they are combined."""

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
from kd_plugin.teachers import KINDS, AdapterTeacher, LocalTeacher, Teacher

_ESTIMATOR_KEYS = ("top_k", "student_top_k", "ratio_bounds")
_PANEL_KEYS = (
    "teachers",
    "combine",
    "divergence",
    "domain_weights",
    "routes",
    "confidence_temperature",
    "estimator",
    "allow_other_eos",
    *_ESTIMATOR_KEYS,
)
_OWN_KEYS = ("kind", "weight", "divergence", "temperature", "estimator")
# TRL loads teachers in float32 unless told, and one teacher must train as it does there
_DEFAULTS = {"dtype": "float32"}


def panel_from_block(block: Mapping[str, Any] | str | Path, where: str = "panel") -> TeacherPanel:
    """Build the panel that a block describes; no weights are loaded.

    Keys: ``combine``, ``divergence`` (a name, or a mapping with ``name``, ``beta``, ``alpha``), ``routes``,
    ``domain_weights``, ``confidence_temperature``, ``estimator``, ``top_k``, ``student_top_k``, ``ratio_bounds``,
    ``allow_other_eos``, and
    ``teachers``, name to a mapping. A teacher has ``kind`` (``local`` where it is left out, ``adapter``, ``server``,
    ``cached``), ``weight`` (a number or a schedule), ``divergence``, ``temperature`` and ``estimator`` of its own, and
    the arguments of its class: ``model``, ``adapter`` and ``base``, ``url``, ``cache``, ``placement`` and so on. A base
    is ``student``, a path, the name of a local teacher, or a mapping with the arguments of ``LocalTeacher``.

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
    )


def _teachers(described: Mapping[str, Any], where: str) -> dict[str, Teacher]:
    """Make the teachers; adapters last, since they may name one of the others as their base."""
    made: dict[str, Teacher] = {}
    bases: dict[str, LocalTeacher] = {}
    for name, given in described.items():
        spec = {"model": given} if isinstance(given, str) else given
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{where}: teacher {name!r} is {given!r}; expected a path, a hub id or a mapping.")
        kind = spec.get("kind", "local")
        if kind not in KINDS:
            raise ConfigError(
                f"{where}: teacher {name!r} has kind {kind!r}; expected one of {', '.join(KINDS)}."
                + nearest(str(kind), list(KINDS))
            )
        if kind != "adapter":
            made[name] = _make(KINDS[kind], spec, f"{where}: teacher {name!r}", _OWN_KEYS, name)
    for name, spec in described.items():
        if isinstance(spec, Mapping) and spec.get("kind") == "adapter":
            label = f"{where}: teacher {name!r}"
            base = _base(spec.get("base", "student"), made, bases, label)
            made[name] = _make(AdapterTeacher, {**spec, "base": base}, label, _OWN_KEYS, name)
    return {name: made[name] for name in described}


def _base(given: Any, made: Mapping[str, Teacher], bases: dict[str, LocalTeacher], label: str) -> Any:
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
    temperature = spec.get("temperature")
    own = None if spec.get("estimator") is None else replace(estimator, name=spec["estimator"])
    divergence = _divergence(spec.get("divergence"), label)
    try:
        return OwnTerms(divergence, temperature, own)
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
