"""The lock that a killed build of a DeepSpeed op leaves behind, on which later runs wait for ever without a word."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kd_plugin.errors import ConfigError

logger = logging.getLogger(__name__)
# No op takes as long to build. A younger lock may be that of a build on another machine, in a home that both share
STALE_SECONDS = 900.0


@dataclass(frozen=True)
class OpLock:
    """A lock that no process of this machine holds.

    Attributes:
        op: DeepSpeed's name of what was built, such as ``cpu_adam``.
        path: the file.
        seconds: its age.
    """

    op: str
    path: Path
    seconds: float

    def __str__(self) -> str:
        """Say what it does, and which file to delete."""
        if self.seconds < STALE_SECONDS:
            doubt = f"No process of this machine holds it. Unless another one builds {self.op} now, delete {self.path}."
        else:
            doubt = f"No build takes so long: delete {self.path}."
        return (
            f"a build of DeepSpeed's op {self.op} left a lock behind, {self.seconds / 60:.0f} minutes old, on which "
            f"runs that need the op wait for ever. {doubt}"
        )


def op_directory() -> Path:
    """Return where torch builds ops in this environment, each in a directory of its own; nothing is made."""
    from torch.utils.cpp_extension import get_default_build_root

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named)
    hip, cuda = getattr(torch.version, "hip", None), torch.version.cuda
    kind = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{kind}"


def abandoned_locks() -> list[OpLock]:
    """Find the locks of ops that no process here is building; nothing is deleted.

    A build holds its lock open to its end (``torch.utils.file_baton``), so one that nobody has open is left over,
    or belongs to another machine.
    """
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return []
    found = {path.resolve(): path for path in op_directory().glob("*/lock")}
    if not found:
        return []
    held, locks = _open_files(), []
    for real, path in found.items():
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # its build ended meanwhile
            continue
        if str(real) not in held:
            locks.append(OpLock(path.parent.name, path, max(age, 0.0)))
    return locks


def require_unlocked(ops: Collection[str]) -> None:
    """Refuse to wait for ever for one of ``ops``, which the run is about to load; speak of other and of young locks.

    Raises:
        ConfigError: names the file to delete, and its age.
    """
    for lock in abandoned_locks():
        if lock.op in ops and lock.seconds >= STALE_SECONDS:
            raise ConfigError(f"This run would hang: {lock}")
        logger.warning("%s", lock)


def _open_files() -> set[str]:
    """Return what the processes of this machine have open, as far as they may be asked."""
    import psutil  # DeepSpeed needs it too

    paths: set[str] = set()
    for process in psutil.process_iter():
        try:
            paths.update(file.path for file in process.open_files())
        except psutil.Error:  # it ended, or is another user's
            continue
    return paths
