"""Where a checkpoint's lineage lies: inside a directory of weights, or beside a single file."""

from __future__ import annotations

import os
from pathlib import Path

SIDECAR = ".lineage"


def lineage_directory(checkpoint: str | Path) -> Path:
    """Return the directory that holds, or will hold, a checkpoint's lineage files.

    Args:
        checkpoint: a directory of weights, which holds them itself; or a single file such as Lightning's
            ``epoch=0.ckpt``, whose lineage lies beside it in ``epoch=0.ckpt.lineage/``. A link is followed.
    """
    path = Path(checkpoint)
    if path.is_symlink():
        path = path.resolve()
    return path.with_name(path.name + SIDECAR) if path.is_file() else path


def is_directory(name: str) -> bool:
    """Whether a name that a stranger may have written is a directory's; no file system has one that is too long."""
    return os.path.isdir(name)


def is_file(path: Path) -> bool:
    """Whether a path is a file's, as :func:`is_directory` says it; ``Path.is_file`` raises OSError for long names."""
    return os.path.isfile(path)


def weights_of(directory: Path) -> Path:
    """Return where the weights of a lineage directory are: the file beside a sidecar, else the directory itself."""
    beside = directory.with_name(directory.name.removesuffix(SIDECAR))
    return beside if directory.name.endswith(SIDECAR) and beside.is_file() else directory
