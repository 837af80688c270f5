"""The stages of a recipe: commands of this package, each with its settings in a file, done once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.recipes import TRAINING


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name: of the stage, and of its files.
        command: of this package.
        config: its settings.
        result: directory that it fills.
        files: digest of the files that it reads.
        launcher: words before ``-m kd_plugin``.
    """

    name: str
    command: str
    config: Mapping[str, Any]
    result: Path
    files: str = ""
    launcher: tuple[str, ...] = (sys.executable,)

    @property
    def trains(self) -> bool:
        """Whether its result is a student."""
        return self.command in TRAINING

    @property
    def digest(self) -> str:
        """What changes when its settings or the files that it reads do."""
        return hashlib.sha256(json.dumps([self.config, self.files], sort_keys=True).encode()).hexdigest()


class Stages:
    """The stages of a recipe in a directory, and which of them are done.

    Args:
        output_dir: of the recipe.
        stages: in order.
        cache_dir: where captures are kept that other recipes share; None where they are this one's own.
    """

    def __init__(self, output_dir: str, stages: Sequence[Stage], cache_dir: str | None = None) -> None:
        self.stages = stages
        self._files = Path(output_dir) / "recipe"
        self._shared = Path(cache_dir or output_dir) / "recipe"

    @property
    def student(self) -> Path | None:
        """The last student that is trained; None where none is."""
        return next((stage.result for stage in reversed(self.stages) if stage.trains), None)

    def done(self) -> dict[str, bool]:
        """Return whether each stage was done with these settings and these files.

        Raises:
            ConfigError: one was done with others, naming what changed; or with an earlier stage that is gone.
        """
        found: dict[str, bool] = {}
        for stage in self.stages:
            found[stage.name] = self._is_done(stage)
            before = [name for name, is_done in found.items() if not is_done]
            if found[stage.name] and before and stage.command != "capture":
                raise ConfigError(
                    f"{stage.name} was done, and {before[0]}, on which it rests, is not there. Delete {stage.result} "
                    "to do both again, or choose another output_dir."
                )
        return found

    def _is_done(self, stage: Stage) -> bool:
        mark = self._mark_of(stage)
        if not mark.is_file() or not stage.result.is_dir():
            return False
        before = json.loads(mark.read_text(encoding="utf-8"))
        if before["digest"] == stage.digest:
            return True
        old, new = before["config"], json.loads(json.dumps(stage.config))
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key)) or ["the data's files"]
        raise ConfigError(
            f"{stage.name} was done on {before['date']} with other settings ({', '.join(changed)}). Delete "
            f"{stage.result} and what follows from it to do it again, or choose another output_dir."
        )

    def config_of(self, stage: Stage) -> Path:
        """Return where a stage's settings are written."""
        return self._files / f"{stage.name}.yaml"

    def write(self) -> None:
        """Write the settings of each stage."""
        self._files.mkdir(parents=True, exist_ok=True)
        for stage in self.stages:
            text = yaml.safe_dump(dict(stage.config), sort_keys=False, allow_unicode=True)
            self.config_of(stage).write_text(f"# kd-plugin {stage.command} --config {self.config_of(stage)}\n{text}")

    def seconds(self, stage: Stage) -> float:
        """Return how long a stage that is done took, when it was run last."""
        return float(json.loads(self._mark_of(stage).read_text(encoding="utf-8")).get("seconds", 0.0))

    def run(self, stage: Stage, *, here: bool = False) -> int:
        """Run a stage, resuming where it was interrupted, and return its exit code.

        Args:
            stage: the stage.
            here: in this process, and not in one of its own.
        """
        began, words = time.perf_counter(), [stage.command, "--config", str(self.config_of(stage))]
        if stage.trains and any(stage.result.glob("checkpoint-*")):
            words += ["--resume_from_checkpoint", "true"]
        if here:
            from kd_plugin.cli.main import main as command

            code = command(words)
        else:
            code = subprocess.run([*stage.launcher, "-m", "kd_plugin", *words], check=False).returncode
        if code == 0:
            mark: dict[str, Any] = {
                "digest": stage.digest,
                "config": stage.config,
                "date": str(datetime.now(UTC).date()),
            }
            mark["seconds"] = time.perf_counter() - began
            self._shared.mkdir(parents=True, exist_ok=True)
            self._mark_of(stage).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        return code

    def _mark_of(self, stage: Stage) -> Path:
        return (self._shared if stage.command == "capture" else self._files) / f"{stage.name}.done.json"
