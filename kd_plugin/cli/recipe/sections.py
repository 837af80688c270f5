"""The sections of a recipe, and the stages that they ask for: commands of this package, each with its settings."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from kd_plugin.cli.capture import CaptureConfig, make_generation, make_targets
from kd_plugin.cli.evaluation import EvaluateConfig
from kd_plugin.cli.parsing import typed_section
from kd_plugin.cli.recipe.stages import Stage
from kd_plugin.errors import ConfigError, UsageError, nearest
from kd_plugin.evaluation import load_tasks
from kd_plugin.inputs import YamlFile, local_files, read_yaml, require_file
from kd_plugin.settings import option, settings, values_of

_SET_HERE = {  # settings of a stage that the recipe sets, and where a user sets them instead
    "dataset": "data", "datasets": "data", "dataset_name": "data", "teacher": "teachers", "teacher_models": "teachers",
    "teacher_cache": "teachers", "teacher_text": "teachers", "teachers": "teachers", "model": "student",
    "model_name_or_path": "student", "lineage": "lineage", "output_dir": "output_dir",
}  # fmt: skip
_DATA = ("dataset", "datasets", "split", "dataset_name", "streaming", "dataset_text_field")
_LICENSE = "license"  # of the data; a declaration, and no setting of a command
_TEACHER = ("license", "revision", "dtype", "device")  # of a teacher, settings of its capture
_ON_A_PANEL = ("weight", "kind", "signal", "max_tokens", "temperature", "guided")  # of a teacher, beside its capture's
_LAUNCH = ("processes", "command")
_KEPT_BY_DATASETS = re.compile(r"(cache-.*\.arrow|tmp.*|\..*)$")  # in a directory of rows, by `map` and the like


@settings
class Recipe:
    """What a recipe says; each section has the settings of the command of that name."""

    output_dir: str = option(default="", help="Directory of all results; made where it is not there.")
    cache_dir: str | None = option(
        default=None, help="Where captures are kept, so that several recipes share them; left out, output_dir."
    )
    student: dict[str, Any] | str = option(
        default="", help="The student: a path or hub id, or a mapping with model_name_or_path and TRL's ModelConfig."
    )
    teachers: dict[str, Any] | None = option(
        default=None,
        help="Teachers by name: a path or hub id, or a mapping as in a panel block: model or url, license, weight.",
    )
    data: dict[str, Any] | None = option(
        default=None,
        help="The rows: dataset or datasets, split and so on, as `kd-plugin capture` has; and license, "
        "own for files of yours, which then holds for every stage.",
    )
    capture: dict[str, Any] | None = option(default=None, help="Settings of `kd-plugin capture`, for every teacher.")
    offline: dict[str, Any] | None = option(default=None, help="Settings of `kd-plugin offline`; {} for its defaults.")
    panel: dict[str, Any] | None = option(default=None, help="Settings of `kd-plugin panel`; {} for its defaults.")
    evaluate: dict[str, Any] | None = option(
        default=None, help="Settings of `kd-plugin evaluate`, asked of the trained student: tasks, baseline."
    )
    lineage: dict[str, Any] | str | None = option(
        default=None, help="Declarations of teachers, datasets and use, as a mapping or the path of a YAML file."
    )
    launch: dict[str, Any] | None = option(
        default=None, help="How training starts: processes on this machine, or command, such as `accelerate launch`."
    )


def stages_of(recipe: Recipe, file: YamlFile) -> list[Stage]:
    """Return the stages that a recipe asks for, in order.

    Args:
        recipe: as :func:`checked` returns it.
        file: it was read from.

    Raises:
        UsageError: an unknown key of a section, or a value of another type: names file, line and key.
        ConfigError: a section that is missing, a setting that another section has, or a value that training refuses.
    """
    for name in ("output_dir", "student"):
        if not getattr(recipe, name):
            raise UsageError(f"{file.path}: {name} is not set.")
    if isinstance(recipe.student, dict) and not recipe.student.get("model_name_or_path"):
        raise UsageError(f"{file.where('student')}: student: model_name_or_path is not set.")
    if recipe.capture is None and recipe.offline is None and recipe.panel is None:
        raise UsageError(f"{file.path}: nothing to do; add a section capture, offline or panel.")
    if not recipe.teachers:
        raise UsageError(f"{file.path}: no teachers are named. Add teachers: {{NAME: {{model: PATH}}}}.")
    student = {"model_name_or_path": recipe.student} if isinstance(recipe.student, str) else dict(recipe.student)
    data = data_of(recipe)
    place, declared = Path(recipe.output_dir), declarations(recipe)
    shared = {} if declared is None else {"lineage": declared}
    launcher, files, found = _launcher(recipe, file), data_digest(recipe), list[Stage]()

    def add(name: str, command: str, config: Mapping[str, Any], launcher: tuple[str, ...] = (sys.executable,)) -> None:
        _require_valid(command, config)
        where = Path(recipe.cache_dir) if command == "capture" and recipe.cache_dir else place
        result = where / ("text" if name == "capture-text" else name.replace("capture-", "cache-"))
        config = {**config, "output_dir": str(result)}
        found.append(Stage(name, command, config, result, files, launcher))

    if is_text(recipe):
        add(
            "capture-text",
            "capture",
            {**data, "teachers": writers_of(recipe), **_section(recipe, file, "capture"), **shared},
        )
    elif recipe.capture is not None or recipe.offline is not None:
        for name in recipe.teachers:
            given = {**data, **teacher_of(recipe, name), **_section(recipe, file, "capture")}
            add(f"capture-{name}", "capture", {**given, **shared})
    start = student
    if recipe.offline is not None:
        given = {**_taught_by(recipe, found), **_section(recipe, file, "offline")}
        add("offline", "offline", {**student, **given, **shared}, launcher)
        start = {**student, "model_name_or_path": str(place / "offline")}
    if recipe.panel is not None:
        rows = {"dataset": "dataset_name", "dataset_name": "dataset_config", "split": "dataset_train_split",
                "streaming": "dataset_streaming"}  # fmt: skip
        section = dict(_section(recipe, file, "panel"))
        teachers = {name: _on_panel(recipe, spec) for name, spec in recipe.teachers.items()}
        block = {"teachers": teachers, **_block(section.pop("panel", None))}
        prompts = {rows.get(key, key): value for key, value in data.items() if key != "dataset_text_field"}
        given = {**prompts, "panel": block, **section}
        add("panel", "panel", {**start, **given, **shared}, launcher)
    if recipe.evaluate is not None:
        students = [stage.result for stage in found if stage.trains]
        if not students:
            raise ConfigError(f"{file.path}: evaluate asks the trained student; add a section offline or panel.")
        tasks = recipe.evaluate.get("tasks")
        files = _digest_of([Path(tasks)] if isinstance(tasks, str) else [])
        add("evaluate", "evaluate", {"model": str(students[-1]), **_section(recipe, file, "evaluate")})
    if not (data.get("dataset") or data.get("datasets")):
        raise UsageError(f"{file.path}: data: neither dataset nor datasets is set; name the rows.")
    return found


def checked(recipe: Recipe, file: YamlFile) -> Recipe:
    """Return a recipe whose data has the types that a capture takes, and whose teachers are described.

    Raises:
        UsageError: an unknown key or another type: names file, line and key.
    """
    for name, spec in (recipe.teachers or {}).items():
        place = f"{file.where('teachers')}: teachers.{name}"
        if not isinstance(spec, str | Mapping):
            raise UsageError(f"{place}: expected a path or hub id, or a mapping with model or url; found {spec!r}.")
        if "/" in name or "\\" in name or name.startswith("."):
            raise UsageError(f"{place}: a directory has the teacher's name; leave out slashes and a leading dot.")
    if recipe.data is None:
        return recipe
    license = recipe.data.get(_LICENSE)
    said = {} if license is None else {_LICENSE: license}
    return replace(recipe, data={**_section(recipe, file, "data"), **said})


def declarations(recipe: Recipe) -> dict[str, Any] | str | None:
    """Return what every stage declares: the section ``lineage``, and the license of the data's own files.

    Raises:
        ConfigError: the data has a license, and the declarations are a file of their own.
    """
    license = (recipe.data or {}).get(_LICENSE)
    if license is None:
        return recipe.lineage
    if isinstance(recipe.lineage, str):
        raise ConfigError(
            f"data: license is set, and lineage is the file {recipe.lineage}. Say it there: datasets: "
            f"[{{repo: FILE, license: {license}}}]; or write the declarations into the recipe."
        )
    declared = dict(recipe.lineage or {})
    known = list(declared.get("datasets") or ())
    named = {entry.get(key) for entry in known for key in ("repo", "name")}
    own = [path.name for path in _places(recipe) if path.exists() and path.name not in named]
    return {**declared, "datasets": [*known, *({"repo": name, "license": str(license)} for name in dict.fromkeys(own))]}


def data_digest(recipe: Recipe) -> str:
    """Return a digest of what the data names on this machine, so that other rows are seen; a hub id counts by name."""
    return _digest_of(_places(recipe))


def _places(recipe: Recipe) -> list[Path]:
    """Return what the data names: files, directories, hub ids; for the name of a builder the files that it reads."""
    data = recipe.data or {}
    parts = [{"path": data.get("dataset")}, *(data.get("datasets") or ())]
    return [place for part in parts if part.get("path") for place in local_files(part) or [Path(str(part["path"]))]]


def _digest_of(places: Sequence[Path]) -> str:
    from kd_plugin.lineage.hashing import sha256_file

    def digest(place: Path) -> str:
        if not place.is_dir():
            return sha256_file(place) if place.is_file() else str(place)
        files = sorted(one for one in place.rglob("*") if one.is_file() and not _KEPT_BY_DATASETS.match(one.name))
        return ";".join(f"{one.relative_to(place)}={sha256_file(one)}" for one in files)

    return ",".join(map(digest, places))


def student_of(recipe: Recipe) -> str:
    """Return where the student is."""
    return recipe.student if isinstance(recipe.student, str) else str(recipe.student["model_name_or_path"])


def _section(recipe: Recipe, file: YamlFile, name: str) -> dict[str, Any]:
    """Return the settings of a section, each of the type that its command takes."""
    if getattr(recipe, name) is None:
        return {}
    if name == "data":
        known: list[type] = [CaptureConfig]
    elif name == "capture":
        from kd_plugin.cli.text import TextCaptureConfig

        known = [TextCaptureConfig if is_text(recipe) else CaptureConfig]
    elif name == "evaluate":
        known = [EvaluateConfig]
    else:
        from trl import ModelConfig

        from kd_plugin import trl
        from kd_plugin.cli.training import DataArguments

        config = trl.OfflineKDConfig if name == "offline" else trl.TeacherPanelConfig
        known = [config, ModelConfig, DataArguments]
    found = typed_section(file, name, known)
    for key in found:
        if name == "data" and key not in (*_DATA, _LICENSE):
            raise UsageError(f"{file.where(name)}: data: unknown key {key!r}.{nearest(key, [*_DATA, _LICENSE])}")
        if name != "data" and key in _SET_HERE and not (name == "panel" and key == "panel"):
            raise UsageError(
                f"{file.where(name)}: {name}: {key} is set by the recipe's {_SET_HERE[key]}; set it there."
            )
    # As YAML writes them: transformers reads words such as `steps` into enumerations
    plain = {key: value.value if isinstance(value, Enum) else value for key, value in found.items()}
    return {key: value for key, value in plain.items() if (name, key) != ("data", _LICENSE)}


def data_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a capture is told of the rows."""
    return {key: value for key, value in (recipe.data or {}).items() if key in _DATA and value is not None}


def teacher_of(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return what a capture is told of a teacher."""
    given = (recipe.teachers or {})[name]
    spec = {"model": given} if isinstance(given, str) else dict(given)
    own = {key: spec.pop(key) for key in _TEACHER if key in spec}
    for key in ("weight", "kind"):
        spec.pop(key, None)
    if "url" in spec:
        return {"teacher": spec, "teacher_name": name, **own}
    if set(spec) != {"model"}:
        raise ConfigError(f"teachers: {name}: expected model, or url and more; found {', '.join(spec) or 'nothing'}.")
    return {"teacher": spec["model"], "teacher_name": name, **own}


def is_text(recipe: Recipe) -> bool:
    """Whether the captures store text."""
    return (recipe.capture or {}).get("targets") == "text"


def writers_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a capture of text is told of its teachers."""
    specs = {n: {"model": one} if isinstance(one, str) else one for n, one in (recipe.teachers or {}).items()}
    return {n: {key: value for key, value in one.items() if key not in _ON_A_PANEL} for n, one in specs.items()}


def _on_panel(recipe: Recipe, spec: Any) -> Any:
    """Return what a panel is told of a teacher: a server that wrote text corrects by text, if nothing else is said."""
    if not (is_text(recipe) and isinstance(spec, Mapping) and "url" in spec):
        return spec
    return {"kind": "server", "signal": "text", **{key: value for key, value in spec.items() if key != "api"}}


def _taught_by(recipe: Recipe, captures: Sequence[Stage]) -> dict[str, Any]:
    """Return what offline training is told of what was captured."""
    if is_text(recipe):
        return {"teacher_text": str(captures[0].result), "kd_weight": 0.0, "ce_weight": 1.0}
    names = recipe.teachers or {}
    weights = {str(stage.result): _weight(recipe, name) for stage, name in zip(captures, names, strict=True)}
    return {"teacher_cache": weights if len(weights) > 1 else next(iter(weights))}


def _block(given: Any) -> dict[str, Any]:
    """Return the block of a panel: a mapping, or a YAML file with it."""
    return dict(read_yaml(given) if isinstance(given, str) else given or {})


def _weight(recipe: Recipe, name: str) -> float:
    given = (recipe.teachers or {})[name]
    weight = given.get("weight", 1.0) if isinstance(given, Mapping) else 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise ConfigError(f"teachers: {name}: weight: expected a number above 0 for its cache, found {weight!r}.")
    return float(weight)


def _require_valid(command: str, config: Mapping[str, Any]) -> None:
    """Refuse values that a stage would refuse, before another one has taken hours; no weights are loaded.

    Raises:
        ConfigError: a value out of range, an unknown name, or a panel that cannot be.
        DataError: a file of questions is not there.
    """
    if command == "capture":
        from kd_plugin.cli.text import TextCaptureConfig

        if config.get("targets") == "text":
            TextCaptureConfig(**config)
            return
        made = CaptureConfig(**config)
        make_targets(made)
        make_generation(made)
        return
    if command == "evaluate":
        for task in load_tasks(config.get("tasks") or {}):
            require_file(Path(task.settings.rows))
        return
    from kd_plugin.divergence.objective import OfflineSettings
    from kd_plugin.panel.block import panel_from_block
    from kd_plugin.panel.settings import PanelSettings

    settings: type = OfflineSettings if command == "offline" else PanelSettings
    settings(**values_of(settings, config))
    teachers = (config.get("panel") or {}).get("teachers") or {}
    if command == "panel" and not any("cache" in one for one in teachers.values() if isinstance(one, Mapping)):
        panel_from_block(config["panel"])  # a cache may be captured by then


def _launcher(recipe: Recipe, file: YamlFile) -> tuple[str, ...]:
    launch = recipe.launch or {}
    for key in launch:
        if key not in _LAUNCH:
            raise UsageError(f"{file.where('launch')}: launch: unknown key {key!r}.{nearest(str(key), list(_LAUNCH))}")
    command = launch.get("command")
    if command is not None:
        try:
            words = shlex.split(command) if isinstance(command, str) else []
        except ValueError:
            words = []
        if not words:
            where = file.where("launch")
            raise UsageError(f"{where}: launch.command: expected words, as `accelerate launch`; found {command!r}.")
        return tuple(words)
    processes = launch.get("processes", 1)
    if not isinstance(processes, int) or processes < 1:
        where = file.where("launch")
        raise UsageError(f"{where}: launch.processes: expected a whole number of at least 1, found {processes!r}.")
    if processes > 1:
        return (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes))
    return (sys.executable,)
