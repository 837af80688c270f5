"""Placing lineage files beside weights, so that the record's presence means that the rest is whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd_plugin.errors import LineageError
from kd_plugin.lineage import hashing
from kd_plugin.lineage.record import BOM, LICENSES, NOTICE, RECORD, canonical, read_record


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Let one writer at a time, of all threads and processes of this user and machine, place files in a directory."""
    place = Path(tempfile.gettempdir(), f"kd-plugin-locks-{os.getuid() if hasattr(os, 'getuid') else 'user'}")
    place.mkdir(mode=0o700, exist_ok=True)
    with FileLock(place / hashlib.sha256(str(directory.resolve()).encode()).hexdigest()):
        yield


def retract(directory: Path) -> list[str]:
    """Remove an older record, so that a crash from here on leaves a checkpoint that says it is unfinished.

    Returns:
        The files that the older record had placed.
    """
    path = directory / RECORD
    if not path.exists():
        return []
    try:
        record, _ = read_record(path)
        placed = [str(f["path"]) for f in record["files"]]
    except (LineageError, KeyError, TypeError):
        placed = []  # a damaged record promises nothing, and its files are left alone
    path.unlink()
    _sync_directory(directory)
    return placed


def place_files(
    directory: Path, notice: str, bom: str, licenses: Mapping[str, str], stale: list[str]
) -> list[dict[str, Any]]:
    """Write NOTICE, the bill of materials and LICENSES/, and return their digests.

    Licence texts that only an older record placed are dropped.
    """
    texts = {NOTICE: notice, BOM: bom} | {f"{LICENSES}/{name}": text for name, text in licenses.items()}
    _refuse_link(directory / LICENSES)
    if licenses:
        (directory / LICENSES).mkdir(exist_ok=True)
    for old in set(stale) - set(texts):
        if old.startswith(f"{LICENSES}/") and "/" not in old[len(LICENSES) + 1 :]:
            (directory / old).unlink(missing_ok=True)
    for name, text in texts.items():
        write_file(directory / name, text.encode())
    return [
        {"path": name, "sha256": hashing.sha256_text(text), "size": len(text.encode())}
        for name, text in sorted(texts.items())
    ]


def place_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record, last."""
    write_file(directory / RECORD, canonical(record))
    _sync_directory(directory)


def copy_lineage(checkpoint: Path, record: Mapping[str, Any], directory: Path) -> None:
    """Copy the files that ``record`` lists, and then the record itself, from a checkpoint to ``directory``."""
    _refuse_link(checkpoint / LICENSES)
    _refuse_link(directory / LICENSES)
    retract(directory)
    for name in [str(entry["path"]) for entry in record["files"]]:
        if name not in (NOTICE, BOM) and (not name.startswith(f"{LICENSES}/") or "/" in name[len(LICENSES) + 1 :]):
            raise LineageError(f"{checkpoint / RECORD} lists {name!r}, which is no lineage file; it was edited.")
        _refuse_link(checkpoint / name)
        (directory / name).parent.mkdir(exist_ok=True)
        write_file(directory / name, (checkpoint / name).read_bytes())
    place_record(directory, record)


def _refuse_link(path: Path) -> None:
    """Refuse a link in the place of a file or folder of ours: nothing outside a checkpoint is read, written or deleted.

    Raises:
        LineageError: there is one.
    """
    if path.is_symlink():
        raise LineageError(
            f"{path} is a link to {os.readlink(path)!r}; lineage files are not followed out of a checkpoint. The "
            "weights are untouched. Remove the link, or put a folder in its place, and save again."
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename.

    Raises:
        LineageError: the place is not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LineageError(
            f"{path} cannot be written ({error.strerror}). The weights are untouched; without {RECORD} the "
            "checkpoint counts as unfinished. Make the directory writable and save again."
        ) from error


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
