"""The demo's settings, and what its directory holds: one run, the stages it has finished, and what it generated."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd_plugin.demo.prompts import available
from kd_plugin.errors import ConfigError, KDError

# Settings that say where things lie and how fast they run, but not what comes out.
_PLACES = ("output_dir", "model_cache", "threads")
STATE = "demo.json"
LOCK = ".demo.lock"
FORMAT = 1


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


class RunConflictError(KDError, FileExistsError):
    """The directory holds something that this run must not touch."""


class DemoState:
    """The open state of a demo directory; use as a context manager, which keeps other processes out.

    Args:
        config: the settings of this run.
        fresh: delete what an earlier demo wrote there and start again.

    Raises:
        RunConflictError: the directory holds files that no demo wrote, a run with other settings, a state
            file that cannot be read, or a demo that is running now.
    """

    def __init__(self, config: DemoConfig, *, fresh: bool = False) -> None:
        self.config = config
        self.directory = Path(config.output_dir)
        self._lock = FileLock(str(self.directory / LOCK), timeout=0)
        self._fresh = fresh
        self._content: dict[str, Any] = {}

    def __enter__(self) -> DemoState:
        if self.directory.exists() and not self.directory.is_dir():
            raise RunConflictError(f"{self.directory} is a file; name another --output_dir.")
        self._require_own_directory()
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RunConflictError(
                f"Another demo is running in {self.directory}; wait for it, or name another --output_dir."
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def run(self) -> dict[str, str]:
        """Id and date of the run, which its lineage carries; a resumed demo keeps both."""
        return dict(self._content["run"])

    @property
    def resumed(self) -> bool:
        """Whether an earlier call finished some stage."""
        return bool(self._content["resumed"])

    def claim(self, name: str, *, clean: bool = True, survives: bool = False) -> Path:
        """Return the path of ``name`` in the directory and list it as written by the demo.

        Args:
            name: a plain file or directory name.
            clean: delete what an interrupted stage left there.
            survives: ``--fresh`` leaves it alone (a download that no setting changes).

        Raises:
            RunConflictError: something of that name is there that the demo did not write.
        """
        path = self.directory / name
        owned = self._content["survives" if survives else "wrote"]
        if name not in owned:
            if path.exists() or path.is_symlink():
                raise RunConflictError(f"{path} exists and the demo did not write it; move it away.")
            owned.append(name)
            self._save()
        elif clean and not survives:
            _delete(path)
        return path

    def result(self, stage: str) -> Any:
        """Return what a finished stage recorded, or None."""
        return self._content["stages"].get(stage)

    def finish(self, stage: str, result: Any) -> None:
        """Record that a stage is done, with its JSON-ready result."""
        self._content["stages"][stage] = result
        self._save()

    def _require_own_directory(self) -> None:
        if not self.directory.is_dir() or (self.directory / STATE).is_file():
            return
        found = sorted(p.name for p in self.directory.iterdir() if p.name != LOCK)
        if found:
            raise RunConflictError(
                f"{self.directory} is not empty and holds no demo ({', '.join(found[:3])}"
                f"{', ...' if len(found) > 3 else ''}). Nothing was changed; name another --output_dir."
            )

    def _open(self) -> None:
        path = self.directory / STATE
        survives: list[str] = []
        if path.is_file():
            try:
                self._content = json.loads(path.read_text(encoding="utf-8"))
                wrote, stages = self._content["wrote"], self._content["stages"]
                lists = isinstance(wrote, list) and isinstance(self._content["survives"], list)
                readable = self._content["format"] == FORMAT and lists and isinstance(stages, dict)
            except (ValueError, KeyError, TypeError):
                readable = False
            if not readable:
                raise RunConflictError(
                    f"{path} cannot be read by this version of the demo. Delete the directory yourself, or name "
                    "another --output_dir."
                )
            if self._fresh:
                survives = self._content["survives"]
                self._delete_all()
        if not self._content:
            self._content = {
                "format": FORMAT,
                "run": {
                    "id": str(uuid.uuid4()),
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                },
                "config": dataclasses.asdict(self.config),
                "fingerprint": self.config.fingerprint,
                "stages": {},
                "wrote": [],
                "survives": survives,
            }
            self._save()
        elif self._content["fingerprint"] != self.config.fingerprint:
            differences = "; ".join(self.config.differences(self._content["config"]))
            raise RunConflictError(
                f"{self.directory} holds a demo with other settings ({differences}). Nothing was changed. "
                "Add --fresh to delete it and start again, or name another --output_dir."
            )
        self._content["resumed"] = bool(self._content["stages"])

    def _delete_all(self) -> None:
        for name in self._content["wrote"]:
            # The file may have been edited: only plain names inside the directory are ever deleted.
            if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
                raise RunConflictError(f"{self.directory / STATE} lists {name!r}, which is no plain name.")
        for name in self._content["wrote"]:
            _delete(self.directory / name)
        (self.directory / STATE).unlink()
        self._content = {}

    def _save(self) -> None:
        temporary = self.directory / f".{STATE}.tmp"
        content = {k: v for k, v in self._content.items() if k != "resumed"}
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / STATE)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def require_writable(directory: Path) -> None:
    """Refuse a directory that cannot be written to before anything is downloaded."""
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{directory} cannot be written to; name another --output_dir.")
