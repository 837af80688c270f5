"""What a demo directory holds: one run, its settings, the stages it has finished, and what it wrote.

``demo.json`` is written whole or not at all. A name is listed in it before anything is written under that
name, so that ``--fresh`` deletes what the demo wrote and nothing else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd_plugin.demo.config import DemoConfig
from kd_plugin.errors import ConfigError, KDError

STATE = "demo.json"
LOCK = ".demo.lock"
FORMAT = 1


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
