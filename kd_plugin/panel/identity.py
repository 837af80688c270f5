"""What a panel is, by content: so that a run that goes on under another one is noticed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.weights import Schedule
from kd_plugin.teachers.base import identity as teacher_identity
from kd_plugin.teachers.base import state_of
from kd_plugin.text.prompts import Templates

logger = logging.getLogger(__name__)
FILE, ALARM_FILE, TEACHERS_FILE = "panel.json", "alarm.json", "teachers.safetensors"
_VERSION = 1


def panel_identity(panel: TeacherPanel, divergence: Divergence, temperature: float) -> dict[str, Any]:
    """Describe a panel so that two descriptions are equal when they teach the same.

    Weights are described by their sha256: of the files, for a directory; of the tensors, for a model in memory. A hub
    id is described by itself and its commit, a cache by its content, and a server by the names of the model, not by
    its address.

    Args:
        panel: the teachers, and how they are combined.
        divergence: for teachers without one of their own.
        temperature: for teachers without one of their own.

    Returns:
        A mapping that JSON can hold.
    """
    return {
        "version": _VERSION,
        "teachers": {
            name: {**teacher_identity(teacher), **_own(panel, name, divergence, temperature)}
            for name, teacher in panel.members.items()
        },
        **_by_text(panel),
        "combine": panel.combine,
        "domain_weights": {
            domain: {name: _schedule(s) for name, s in weights.items()}
            for domain, weights in panel.weights.domains.items()
        },
        "routes": {domain: list(names) for domain, names in panel.routes.items()},
        "confidence_temperature": panel.confidence_temperature,
    }


class ResumeState:
    """What a run keeps in its checkpoints: which panel taught, what the alarm saw, and teachers that changed.

    Args:
        panel: the teachers, and how they are combined.
        divergence: for teachers without one of their own.
        temperature: for teachers without one of their own.
        alarm: with ``state`` and ``load``; None where nothing can ring it.
    """

    def __init__(self, panel: TeacherPanel, divergence: Divergence, temperature: float, alarm: Any = None) -> None:
        self._of = panel, divergence, temperature
        self.alarm = alarm

    def state_dict(self) -> dict[str, Any]:
        """Return all three; JSON can hold it, but for ``teachers``: name to tensors, for those that change."""
        kept = {name: state_of(teacher) for name, teacher in self._of[0].teachers.items()}
        return {
            "panel": panel_identity(*self._of),
            "alarm": None if self.alarm is None else self.alarm.state(),
            "teachers": {name: state for name, state in kept.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any], where: str, *, allowed: bool) -> list[str]:
        """Go on from a checkpoint.

        Args:
            state: as :meth:`state_dict` returned it; None in the place of what the checkpoint does not have.
            where: how messages call the checkpoint.
            allowed: take another panel.

        Returns:
            What changed of the panel, one sentence each.

        Raises:
            ConfigError: something changed, and that is not allowed.
        """
        if self.alarm is not None and state["alarm"] is not None:
            self.alarm.load(state["alarm"])
        for name, teacher in self._of[0].teachers.items():
            self._load_teacher(name, teacher, (state.get("teachers") or {}).get(name), where, allowed=allowed)
        if state["panel"] is None:
            return []
        return require_same_panel(state["panel"], panel_identity(*self._of), where, allowed=allowed)

    @staticmethod
    def _load_teacher(name: str, teacher: Any, state: Any, where: str, *, allowed: bool) -> None:
        """Give a teacher that changes in training what the checkpoint holds of it."""
        if state:
            teacher.load_state_dict(state)
        elif getattr(teacher, "follows", False):
            message = (
                f"{where} holds no state of teacher {name!r}, which follows the student: its average would begin anew."
            )
            if not allowed:
                raise ConfigError(f"{message} Resume from a checkpoint of this panel, or set allow_changed_panel=True.")
            logger.warning(message)


def write_state(directory: str | Path, state: Mapping[str, Any]) -> None:
    """Write what :meth:`ResumeState.state_dict` returned: ``panel.json``, ``alarm.json``, ``teachers.safetensors``."""
    write_identity(directory, state["panel"])
    tensors = {f"{name}/{key}": t for name, kept in state["teachers"].items() for key, t in kept.items()}
    if tensors:
        from safetensors.torch import save_file

        save_file({key: t.contiguous() for key, t in tensors.items()}, Path(directory, TEACHERS_FILE))
    if state["alarm"] is not None:
        Path(directory, ALARM_FILE).write_text(json.dumps(state["alarm"]))


def read_state(directory: str | Path, *, allowed: bool) -> dict[str, Any]:
    """Read what :func:`write_state` wrote; None in the place of what is not there.

    Args:
        directory: of the checkpoint.
        allowed: whether another panel is taken, so that a damaged ``panel.json`` counts as none.

    Raises:
        ConfigError: ``panel.json`` is damaged.
    """
    alarm = Path(directory, ALARM_FILE)
    state: dict[str, Any] = {"panel": None, "alarm": json.loads(alarm.read_text()) if alarm.is_file() else None}
    state["teachers"] = _read_teachers(Path(directory, TEACHERS_FILE))
    try:
        state["panel"] = read_identity(directory)
    except ConfigError as error:
        if not allowed:
            raise
        logger.warning(str(error))
    if state["panel"] is None:
        logger.warning(f"{directory} does not say which panel it was trained under, so it cannot be compared.")
    return state


def _read_teachers(path: Path) -> dict[str, dict[str, Any]]:
    """Read the tensors of teachers that change in training, by name; nothing where there are none."""
    if not path.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Resume from another checkpoint.") from error
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, parameter = key.partition("/")
        found.setdefault(name, {})[parameter] = tensor
    return found


def write_identity(directory: str | Path, identity: Mapping[str, Any]) -> None:
    """Write ``panel.json`` into a checkpoint."""
    Path(directory, FILE).write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_identity(directory: str | Path) -> dict[str, Any] | None:
    """Read ``panel.json`` of a checkpoint; None where there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = Path(directory, FILE)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["teachers"], dict):
            raise TypeError("teachers is no mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}), so it cannot be checked whether this is the panel of the run. Resume from "
            "another checkpoint, or set allow_changed_panel=True."
        ) from error
    return found  # type: ignore[no-any-return]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between two identities, one sentence each; nothing when they are equal."""
    # As a file would give both back; a checkpoint of Lightning keeps tuples
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    found = []
    for name in sorted(before["teachers"].keys() | now["teachers"].keys()):
        one, other = before["teachers"].get(name), now["teachers"].get(name)
        if one is None:
            found.append(f"teacher {name!r} is new")
        elif other is None:
            found.append(f"teacher {name!r} is gone")
        else:
            found += [f"teacher {name!r}: {change}" for change in _changes(one, other)]
    rest = {"teachers", "version"}
    found += _changes(
        {k: v for k, v in before.items() if k not in rest}, {k: v for k, v in now.items() if k not in rest}
    )
    return found


def require_same_panel(before: Mapping[str, Any], now: Mapping[str, Any], where: str, *, allowed: bool) -> list[str]:
    """Compare the panel of a checkpoint with the present one.

    Args:
        before: the checkpoint's.
        now: the present one's.
        where: how messages call the checkpoint.
        allowed: take another panel.

    Returns:
        What changed, one sentence each.

    Raises:
        ConfigError: something changed, and that is not allowed.
    """
    changed = differences(before, now)
    if changed and not allowed:
        raise ConfigError(
            f"{where} was trained under another panel: {'; '.join(changed)}. Resume with the same panel, or set "
            "allow_changed_panel=True: the change then stands in the lineage."
        )
    return changed


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {_short(one.get(key))} and is {_short(other.get(key))}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."
    return json.dumps(value) if not isinstance(value, str) else repr(value)


def _by_text(panel: TeacherPanel) -> dict[str, Any]:
    """Describe what text teachers are asked by, and the reward; nothing where there are none."""
    found: dict[str, Any] = {}
    if panel.text_teachers:
        settings = {**vars(panel.text), "verifier": getattr(panel.text.check(), "name", None)}
        for name in ("min_teachers", "ceiling"):  # they end a run, and teach nothing
            settings.pop(name)
        found["text"] = {**settings, "templates": Templates.load(panel.text.templates).identity}
    if panel.reward is not None:
        found["reward"] = panel.reward.identity
    return found


def _schedule(schedule: Schedule) -> Any:
    return schedule.end if schedule.start == schedule.end else dataclasses.asdict(schedule)


def _own(panel: TeacherPanel, name: str, divergence: Divergence, temperature: float) -> dict[str, Any]:
    own = panel.own[name]
    chosen = own.divergence or divergence
    estimator = own.estimator or panel.estimator
    return {
        "weight": _schedule(panel.weights.teachers[name]),
        "divergence": {"name": chosen.name, **chosen.parameters},
        "temperature": own.temperature_or(temperature),
        "estimator": estimator.name if estimator.name == "exact" else dataclasses.asdict(estimator),
        **({} if own.view is None else {"view": own.view.identity}),
    }
