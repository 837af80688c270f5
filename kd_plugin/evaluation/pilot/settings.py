"""Settings of a pilot, and what it decided so far, kept beside its runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.pilot.trials import METHODS
from kd_plugin.settings import option, require_known, settings

_UNITS = ("flops", "seconds", "money")
_GROWS = ("output_dir", "methods", "seeds")  # may change when a pilot goes on


@settings
class PilotConfig:
    """Settings of a pilot.

    Raises:
        ConfigError: an unknown method or unit, or a number out of range.
    """

    output_dir: str = option(default="", help="Directory of all runs and of the report.")
    student: dict[str, Any] | str = option(default="", help="The student, as in `kd-plugin run`.")
    teachers: dict[str, Any] | None = option(
        default=None,
        help="Teachers by name, as in `kd-plugin run`; those with signal: text correct, and all others score.",
    )
    data: dict[str, Any] | None = option(default=None, help="The prompts that are trained on, as in `kd-plugin run`.")
    tasks: dict[str, Any] | str = option(
        default="", help="Your own questions: a file of tasks as `kd-plugin evaluate` takes it, or its mapping."
    )
    methods: list[str] | None = option(
        default=None,
        help="Some of offline_teacher, offline_student, panel, warmup_panel, text_correction; left out, all that the "
        "teachers allow.",
    )
    unit: str = option(default="flops", help="What is equal: flops of student and teachers, seconds, or money.")
    budget: float = option(default=0.0, help="What each run may take, its captures included, in that unit.")
    price_per_hour: float = option(default=0.0, help="Of this machine, for unit money; teachers have their own prices.")
    learning_rates: list[float] = option(
        factory=lambda: [1e-5, 3e-5, 1e-4], help="Learning rates that are tried for each method."
    )
    scan_share: float = option(default=0.25, help="Share of a run's steps with which each learning rate is tried.")
    scan_seed: int = option(default=1000, help="Seed of the scan; none of seeds, so that the choice favours none.")
    seeds: list[int] = option(factory=lambda: [0, 1, 2], help="Seeds of the runs that are compared.")
    evaluations: int = option(default=4, help="Evaluations of each run, by which accuracy is drawn against cost.")
    warmup_share: float = option(default=0.3, help="Share of the budget that the warm-up of warmup_panel takes.")
    probe_steps: int = option(default=4, help="Steps by which it is measured what a step costs.")
    epochs: float = option(default=1.0, help="How often offline KD goes through what is captured for it.")
    capture: dict[str, Any] | None = option(default=None, help="Settings of `kd-plugin capture`, for every method.")
    offline: dict[str, Any] | None = option(default=None, help="Settings of `kd-plugin offline`.")
    panel: dict[str, Any] | None = option(default=None, help="Settings of `kd-plugin panel`.")
    text: dict[str, Any] | None = option(
        default=None, help="How text_correction evaluates and corrects: `text` of a panel block."
    )
    lineage: dict[str, Any] | str | None = option(default=None, help="Declarations, as in `kd-plugin run`.")
    launch: dict[str, Any] | None = option(default=None, help="How training starts, as in `kd-plugin run`.")

    def __post_init__(self) -> None:
        require_known("unit", self.unit, _UNITS)
        for name in self.methods or ():
            require_known("method", name, list(METHODS))
        for name in ("evaluations", "probe_steps", "epochs"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number above 0.")
        if not 0 <= self.budget < math.inf:
            raise ConfigError(f"budget is {self.budget:g}; expected a number above 0.")
        for name in ("scan_share", "warmup_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1.")
        if not self.learning_rates or not self.seeds:
            raise ConfigError("learning_rates and seeds need one entry at least.")
        if self.scan_seed in self.seeds:
            raise ConfigError(
                f"scan_seed {self.scan_seed} is one of seeds: the learning rate would be chosen on a run that is "
                "compared. Take another."
            )


@dataclass
class State:
    """What a pilot decided so far, kept beside its runs.

    Attributes:
        path: its file.
        digest: of the settings.
        steps: by method how long it trains.
        rates: by method its learning rate.
    """

    path: Path
    digest: str
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PilotConfig) -> State:
        """Read it, or begin.

        Raises:
            ConfigError: the directory holds a pilot with other settings.
        """
        kept = {key: value for key, value in asdict(config).items() if key not in _GROWS}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        path = Path(config.output_dir) / "pilot.json"
        if not path.is_file():
            return cls(path, digest)
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["digest"] != digest:
            raise ConfigError(
                f"{config.output_dir} holds a pilot with other settings; only seeds and methods may be added to. "
                "Choose another output_dir."
            )
        return cls(path, **content)

    def write(self) -> None:
        """Write it, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        made.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        made.replace(self.path)


def teachers_by_kind(teachers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the teachers that score and those that correct by text, by name."""
    text = {n: t for n, t in teachers.items() if isinstance(t, Mapping) and t.get("signal") == "text"}
    return {name: teacher for name, teacher in teachers.items() if name not in text}, text
