"""The settings of the demo."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from kd_plugin.demo.prompts import available
from kd_plugin.errors import ConfigError

# Settings that say where things lie and how fast they run, but not what comes out.
_PLACES = ("output_dir", "model_cache", "threads")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of ``kd-plugin demo``; the defaults take some minutes on two CPU cores.

    Attributes:
        output_dir: Directory for everything that the demo writes. It must be new, empty, or the demo's own.
        model_cache: Directory for the downloaded teacher, to share it between runs. Empty: inside output_dir.
        teacher: Model directory or hub id to use as the teacher. Empty: SmolLM2-135M-Instruct, wherever it
            can be had.
        teacher_license: License of ``teacher`` where none can be discovered: a hub id such as apache-2.0, or own.
        student_layers: Layers of the teacher that the student keeps, counted from 0, such as "0-8,19-29".
        seed: Seed of training and sampling.
        threads: CPU threads. 0: as many as the process may use.
        train_prompts: Questions of each domain to learn from, at most all that are bundled.
        held_out_prompts: Questions of each domain to measure with, at most all that are bundled.
        max_completion_length: Longest answer, in tokens.
        batch_size: Rows of a training step.
        specialist_steps: Steps that turn a copy of the teacher into the math teacher.
        specialist_learning_rate: Highest learning rate of those steps.
        top_k: Tokens of the teacher's distribution that the cache keeps at each position.
        offline_steps: Steps of offline KD.
        offline_learning_rate: Highest learning rate of those steps.
        panel_steps: Steps of the on-policy teacher panel.
        panel_learning_rate: Highest learning rate of those steps.
    """

    output_dir: str = "kd-plugin-demo"
    model_cache: str = ""
    teacher: str = ""
    teacher_license: str = ""
    student_layers: str = "0-8,19-29"
    seed: int = 0
    threads: int = 0
    train_prompts: int = 80
    held_out_prompts: int = 16
    max_completion_length: int = 32
    batch_size: int = 16
    specialist_steps: int = 9
    specialist_learning_rate: float = 2e-4
    top_k: int = 64
    offline_steps: int = 24
    offline_learning_rate: float = 3e-4
    panel_steps: int = 10
    panel_learning_rate: float = 1.5e-4

    def __post_init__(self) -> None:
        for name in (
            "train_prompts",
            "held_out_prompts",
            "max_completion_length",
            "batch_size",
            "specialist_steps",
            "top_k",
            "offline_steps",
            "panel_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("specialist_learning_rate", "offline_learning_rate", "panel_learning_rate"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (all that may be used) or more, got {self.threads}.")
        if not self.output_dir:
            raise ConfigError("output_dir is empty; name the directory that the demo may write to.")
        self.kept_layers()  # refuse a wrong list now, not after the download

    def kept_layers(self) -> list[int]:
        """Return ``student_layers`` as numbers.

        Raises:
            ConfigError: it is no list of numbers and ranges.
        """
        kept: list[int] = []
        for part in self.student_layers.split(","):
            first, _, last = part.strip().partition("-")
            try:
                kept.extend(range(int(first), int(last or first) + 1))
            except ValueError as error:
                raise ConfigError(
                    f'student_layers={self.student_layers!r}: {part!r} is no number or range; write "0-8,19-29".'
                ) from error
        return kept

    def limit(self, split: str, domain: str) -> int:
        """How many questions of a domain a split takes: what was asked for, or all that are bundled."""
        wanted = self.train_prompts if split == "train" else self.held_out_prompts
        return min(wanted, available(split, domain))

    @property
    def fingerprint(self) -> str:
        """Sha256 of all settings that change what comes out."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in _PLACES}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, other: dict[str, object]) -> list[str]:
        """Name the settings that change what comes out and differ from ``other``, with both values."""
        mine = dataclasses.asdict(self)
        names = [n for n in mine if n not in _PLACES and mine[n] != other.get(n)]
        return [f"{n}: {other.get(n)!r} there, {mine[n]!r} now" for n in names]

    @classmethod
    def smoke(cls) -> DemoConfig:
        """Return settings that run every step in under a minute, and learn nothing worth seeing."""
        return cls(
            train_prompts=8,
            held_out_prompts=4,
            max_completion_length=12,
            batch_size=4,
            specialist_steps=2,
            top_k=16,
            offline_steps=2,
            panel_steps=2,
        )
