"""Where a checkpoint's lineage lies: inside a directory of weights, or beside a single file."""

from __future__ import annotations

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


def weights_of(directory: Path) -> Path:
    """Return where the weights of a lineage directory are: the file beside a sidecar, else the directory itself."""
    beside = directory.with_name(directory.name.removesuffix(SIDECAR))
    return beside if directory.name.endswith(SIDECAR) and beside.is_file() else directory
