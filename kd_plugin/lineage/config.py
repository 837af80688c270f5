"""The user's ``lineage`` field: a mapping or a YAML file that declares what discovery cannot know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.lineage.front_matter import MAX_BYTES, parse_yaml
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.verdict import FACTS, Override, read_overrides, require_date
from kd_plugin.settings import option, settings

_KEYS = ("student", "teachers", "datasets", "use", "overrides", "run", "registry")
_LICENSE_KEYS = ("license", "license_name", "license_link")  # the hub's own convention: `other`, a name and a link
_SOURCE_KEYS = (
    "repo", "revision", *_LICENSE_KEYS, "reason", "endpoint", "endpoint_terms", "model", "signal", "generated_by",
    "name",
)  # fmt: skip
_STUDENT_KEYS = ("repo", "revision", *_LICENSE_KEYS, "reason", "name", "declared_license", "merged_from")
_PARENT_KEYS = ("repo", "revision", *_LICENSE_KEYS, "reason")
_DATASET_KEYS = ("repo", "revision", *_LICENSE_KEYS, "reason", "generated_by", "name")
_WRITER_KEYS = ("model", *_LICENSE_KEYS, "reason", "revision", "endpoint", "endpoint_terms")
_RUN_KEYS = ("id", "date", "repo", "commit")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@settings
class LineageSettings:
    """License lineage; what the user declares of it."""

    lineage: dict[str, Any] | str | None = option(
        default=None,
        help="License lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, "
        "overrides and run. What it leaves out is discovered.",
    )


@dataclass(frozen=True)
class Declaration:
    """What the user declares of one source; empty fields are left to discovery."""

    repo: str | None = None
    revision: str | None = None
    license: str | None = None
    reason: str | None = None
    endpoint: str | None = None
    endpoint_terms: str | None = None
    model: str | None = None
    signal: str | None = None
    generated_by: tuple[str, ...] | None = None
    generators: tuple[Source, ...] | None = None
    name: str | None = None
    declared_license: str | None = None
    merged_from: tuple[Source, ...] = ()

    def applied_to(self, source: Source) -> Source:
        """Return ``source`` with what is declared here in the place of what it leaves out or says otherwise."""
        values: dict[str, Any] = {
            "ref": source.ref or self.repo,
            "license": self.license,
            "reason": self.reason,
            "revision": self.revision,
            "endpoint": self.endpoint,
            "endpoint_terms": self.endpoint_terms,
            "model": self.model,
            "signal": self.signal,
            "generated_by": self.generated_by,
            "generators": self.generators,
            "writers_declared": True if self.generated_by is not None else None,
        }
        return replace(source, **{k: v for k, v in values.items() if v is not None})


@dataclass(frozen=True)
class LineageConfig:
    """The ``lineage`` field, checked.

    Attributes:
        student: what is declared of the student.
        teachers: what is declared of each teacher, by name.
        datasets: what is declared of the datasets.
        use: answers to the questions of :data:`kd_plugin.lineage.policy.FACTS`; missing ones are not known.
        run: ``id``, ``date``, ``repo`` and ``commit`` of the run, where the user fixes them.
        overrides: exceptions that the user records.
        registry: path of a TOML with licences of the user's own, or None.
    """

    student: Declaration = Declaration()
    teachers: Mapping[str, Declaration] = field(default_factory=dict)
    datasets: tuple[Declaration, ...] = ()
    use: Mapping[str, bool] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    registry: Path | None = None


def load_config(config: Mapping[str, Any] | str | Path | LineageConfig | None) -> LineageConfig:
    """Read and check the user's declarations.

    Args:
        config: a mapping, the path of a YAML file, what was read of one, or None.

    Raises:
        ConfigError: unreadable or malformed YAML (with line and column), an unknown key (with the nearest known
            one), or a value of the wrong type.
    """
    if config is None or isinstance(config, LineageConfig):
        return config or LineageConfig()
    if not isinstance(config, str | Path):
        return _load(config, "lineage", Path())
    path = Path(config)
    data = read_yaml(path)
    try:
        return _load(data, str(path), path.parent)
    except ConfigError as error:
        raise ConfigError(_with_line(str(error), path)) from error


def _load(config: Any, where: str, folder: Path) -> LineageConfig:
    data = _mapping(config, where, _KEYS)
    overrides = data.get("overrides") or []
    if not isinstance(overrides, list | tuple) or not all(isinstance(o, Mapping) for o in overrides):
        raise ConfigError(f"{where}.overrides must be a list of mappings, got {overrides!r}.")
    registry = data.get("registry")
    if not isinstance(registry, str | None):
        raise ConfigError(f"{where}.registry must be the path of a TOML file, got {registry!r}.")
    teachers = _mapping(data.get("teachers") or {}, f"{where}.teachers", None)
    datasets = data.get("datasets") or []
    if not isinstance(datasets, Sequence) or isinstance(datasets, str):
        raise ConfigError(f"{where}.datasets must be a list of mappings, got {datasets!r}.")
    run = {k: str(v) for k, v in _mapping(data.get("run") or {}, f"{where}.run", _RUN_KEYS).items()}
    if "date" in run:
        require_date(run["date"], f"{where}.run.date")
    return LineageConfig(
        student=_declaration(data.get("student") or {}, f"{where}.student", _STUDENT_KEYS),
        teachers={str(k): _declaration(v or {}, f"{where}.teachers.{k}", _SOURCE_KEYS) for k, v in teachers.items()},
        datasets=tuple(_declaration(d, f"{where}.datasets[{i}]", _DATASET_KEYS) for i, d in enumerate(datasets)),
        use=_facts(data.get("use") or {}, f"{where}.use"),
        run=run,
        overrides=read_overrides(overrides, f"{where}.overrides"),
        registry=None if registry is None else folder / registry,
    )


def read_yaml(path: Path) -> Any:
    """Read a YAML file with the safe loader, at most 1 MiB and without aliases.

    Raises:
        ConfigError: it cannot be read, is too large, uses aliases, or is malformed (with line and column).
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"The lineage file {str(path)!r} cannot be read: {error.strerror}.") from error
    return parse_yaml(raw, str(path))


def _with_line(message: str, path: Path) -> str:
    """Say in which line the key stands that a message is about; messages begin with the key's place."""
    places = {str(path): 1}
    stack = [(str(path), yaml.compose(path.read_text("utf-8"), Loader=_LOADER))]
    while stack:
        where, node = stack.pop()
        if isinstance(node, yaml.MappingNode):
            below = [(f"{where}.{key.value}", key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            below = [(f"{where}[{i}]", item, item) for i, item in enumerate(node.value)]
        else:
            continue
        places |= {name: key.start_mark.line + 1 for name, key, _ in below}
        stack += [(name, value) for name, _, value in below]
    about = max((name for name in places if message.startswith(name)), key=len, default=None)
    if about is None:
        return message
    unknown = re.search(r": unknown key '([^']*)'", message)
    line = places.get(f"{about}.{unknown[1]}", places[about]) if unknown else places[about]
    return f"{about} (line {line}){message.removeprefix(about)}"


def _declaration(value: Any, where: str, keys: tuple[str, ...]) -> Declaration:
    data = _licensed(_mapping(value, where, keys), where)
    declared = data.get("declared_license")
    if isinstance(declared, Mapping):
        place = f"{where}.declared_license"
        data["declared_license"] = _licensed(_mapping(declared, place, _LICENSE_KEYS), place).get("license")
    generated = data.pop("generated_by", None)
    parents = _parents(data.pop("merged_from", None) or [], f"{where}.merged_from")
    for key, item in data.items():
        if item is not None and not isinstance(item, str):
            raise ConfigError(f"{where}.{key} must be a string, got {item!r}.")
    if data.get("signal") not in (None, "text", "logits"):
        raise ConfigError(f"{where}.signal must be 'text' or 'logits', got {data['signal']!r}.")
    if data.get("endpoint_terms") not in (None, "own"):
        raise ConfigError(
            f"{where}.endpoint_terms must be 'own', for a server of yours, got {data['endpoint_terms']!r}. Terms of "
            "others belong into a registry of your own, as a [[service]] with `hosts`."
        )
    if generated is None:
        return Declaration(**data, merged_from=parents)
    items = [generated] if isinstance(generated, str | Mapping) else generated
    if not isinstance(items, list | tuple) or not all(isinstance(g, str | Mapping) for g in items):
        raise ConfigError(f"{where}.generated_by must be a list of model names or mappings, got {generated!r}.")
    writers = [_writer(g, f"{where}.generated_by[{i}]") for i, g in enumerate(items) if isinstance(g, Mapping)]
    return Declaration(**data, generated_by=tuple(g for g in items if isinstance(g, str)), generators=tuple(writers))


def _licensed(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a mapping in which ``license: other`` with a name and a link, as the hub has it, is that name."""
    data = {key: item for key, item in value.items() if key not in ("license_name", "license_link")}
    name, link = value.get("license_name"), value.get("license_link")
    is_other = isinstance(data.get("license"), str) and data["license"].strip().lower() == "other"
    if name is None and link is None and not is_other:
        return data
    if not is_other or not all(isinstance(one, str) and one.strip() for one in (name, link)):
        raise ConfigError(
            f"{where}.license is {data.get('license')!r} with license_name {name!r} and license_link {link!r}; "
            "expected `license: other` with both a name and a link, or a licence alone."
        )
    return {**data, "license": name}


def _parents(value: Any, where: str) -> tuple[Source, ...]:
    """Read the models or adapters that the student's weights were merged from: references, or mappings with terms."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be a list of paths or hub ids, got {value!r}.")
    parents = []
    for i, item in enumerate(value):
        place = f"{where}[{i}]"
        data = _licensed(_mapping({"repo": item} if isinstance(item, str | Path) else item, place, _PARENT_KEYS), place)
        if not data.get("repo") or not all(isinstance(v, str | Path | None) for v in data.values()):
            raise ConfigError(f"{where}[{i}] must be a path, a hub id or {{repo: ..., license: ...}}; got {item!r}.")
        ref = str(data["repo"])
        parents.append(
            Source(Path(ref).name, "model", ref, data.get("revision"), data.get("license"), reason=data.get("reason"))
        )
    return tuple(parents)


def _writer(item: Mapping[str, Any], where: str) -> Source:
    """Read a model that wrote a dataset: its name, and what is declared of it."""
    data = _licensed(_mapping(item, where, _WRITER_KEYS), where)
    if not isinstance(data.get("model"), str) or not all(isinstance(v, str | None) for v in data.values()):
        raise ConfigError(f"{where} must say which model, as in {{model: org/name, license: mit}}; got {item!r}.")
    name = data["model"]
    return Source(
        name,
        "model",
        name,
        revision=data.get("revision"),
        license=data.get("license"),
        reason=data.get("reason"),
        endpoint=data.get("endpoint"),
        endpoint_terms=data.get("endpoint_terms"),
        signal="text",
    )


def _facts(value: Any, where: str) -> dict[str, bool]:
    data = _mapping(value, where, tuple(FACTS))
    for key, item in data.items():
        if not isinstance(item, bool | None):
            raise ConfigError(f"{where}.{key} must be true or false, got {item!r}: {FACTS[key]}")
    return {key: item for key, item in data.items() if item is not None}


def _mapping(value: Any, where: str, keys: tuple[str, ...] | None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {type(value).__name__} {str(value)[:80]!r}.")
    if keys is not None:
        require_known_keys(value, keys, where)
    return value
