"""What a pilot and a ladder need of whoever runs recipes, and the size of the models in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import Architecture, architecture

TRAINING = ("offline", "panel")  # commands whose result is a student


@dataclass(frozen=True)
class Done:
    """A stage of a recipe that was run.

    Attributes:
        command: of this package, such as ``capture``.
        config: its settings.
        result: directory that it filled.
        seconds: that it took.
    """

    command: str
    config: Mapping[str, Any]
    result: Path
    seconds: float

    @property
    def trains(self) -> bool:
        """Whether its result is a student."""
        return self.command in TRAINING


class Recipes(Protocol):
    """Runs recipes as ``kd-plugin run`` takes them, each in its ``output_dir``."""

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a recipe with a setting that is wrong; raises ConfigError."""
        ...

    def refused(self, recipe: Mapping[str, Any]) -> bool:
        """Print what the terms of student, teachers and rows allow; return whether training would be refused.

        Raises:
            ConfigError: a setting is wrong.
        """
        ...

    def run(self, recipe: Mapping[str, Any], log: Path | None = None) -> list[Done]:
        """Run what is left of a recipe, and return all its stages in order.

        Args:
            recipe: sections by name.
            log: file that takes what the stages print; None lets them print.

        Raises:
            ConfigError: a setting is wrong.
            KDError: a stage failed; what is done is kept.
        """
        ...


def student_path(student: Any) -> str:
    """Return where a student is that a recipe names by its path or by a mapping."""
    return str(student["model_name_or_path"] if isinstance(student, Mapping) else student)


def shape_of(model: Any) -> Architecture | None:
    """Return the shape of a model by its configuration; None where that cannot be read."""
    try:
        return architecture(str(model))
    except (ConfigError, OSError):
        return None
