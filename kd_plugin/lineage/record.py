"""``lineage.json``: canonical (RFC 8785), with a digest of itself; where it is, and how it is placed.

A checkpoint's lineage is inside a directory of weights, or beside a single file. The record is placed last, so that its
presence means that the rest is whole. A card, a NOTICE or a bill of materials that this package wrote is the trace of a
record that is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rfc8785
from filelock import FileLock

from kd_plugin.errors import LineageError
from kd_plugin.lineage import hashing

SIDECAR = ".lineage"
RECORD = "lineage.json"
NOTICE = "NOTICE"
BOM = "bom.cdx.json"
LICENSES = "LICENSES"
SCHEMA = "kd-plugin/lineage/1"
MAX_RECORD = 64 << 20  # bytes; a record of a thousand sources stays far below
_OUTSIDE_DIGEST = ("saved_at", "signature", "digest")
SECTION_BEGIN, SECTION_END = "<!-- kd-plugin lineage: begin -->", "<!-- kd-plugin lineage: end -->"
NOTICE_HEADER = "NOTICE of the license lineage of this checkpoint, written by kd-plugin."
BOM_TOOL = "kd-plugin"
SIGNATURE = "lineage.sig"
_READ = 1 << 20  # bytes of a file that are looked at


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


def installed_versions() -> dict[str, str | None]:
    """Return the versions of what trains and of this package; None for what is not installed."""
    return {name: _version(name) for name in ("torch", "transformers", "trl", "lightning", "kd-plugin")}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def digest_of(record: Mapping[str, Any]) -> str:
    """Return ``sha256:`` and the digest of the record without ``saved_at``, ``signature`` and ``digest``."""
    content = {key: value for key, value in record.items() if key not in _OUTSIDE_DIGEST}
    return "sha256:" + hashlib.sha256(rfc8785.dumps(content)).hexdigest()


def sealed(record: Mapping[str, Any], saved_at: str) -> dict[str, Any]:
    """Add digest and saving time; the time carries a seal of its own, so that no byte can change unseen."""
    digest = digest_of(record)
    return {**record, "digest": digest, "saved_at": {"time": saved_at, "seal": time_seal(digest, saved_at)}}


def time_seal(digest: str, saved_at: str) -> str:
    """Bind the saving time, which the digest leaves out, to the record."""
    return hashlib.sha256(f"{digest} {saved_at}".encode()).hexdigest()[:32]


def link_to(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a record says of the checkpoint before its own: the digest of ``record``, its step and its name."""
    return {"digest": record["digest"], "step": record["checkpoint"]["step"], "name": name}


def canonical(record: Mapping[str, Any]) -> bytes:
    """Return the record's canonical bytes."""
    return rfc8785.dumps(dict(record))


def read_record(path: Path) -> tuple[dict[str, Any], bytes]:
    """Read a record and its bytes, checking its shape but not its digest.

    Raises:
        LineageError: missing, too large, no JSON, of another schema, or it does not fit ``lineage.schema.json``.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECORD + 1)
    except OSError as error:
        raise LineageError(
            f"{path} cannot be read ({error.strerror}). A checkpoint without it was not finished, or not written by "
            "a run with lineage; its terms are unknown."
        ) from error
    if len(raw) > MAX_RECORD:
        raise LineageError(f"{path} is larger than {MAX_RECORD} bytes; that is no lineage record.")
    try:
        record = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LineageError(f"{path} is not valid JSON ({error}); it was damaged or edited.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        seen = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise LineageError(f"{path} has schema {seen!r}; expected {SCHEMA!r}. Use the kd-plugin that wrote it.")
    problem = next(iter(_validator().iter_errors(record)), None)
    if problem is not None:
        where = ".".join(str(step) for step in problem.absolute_path) or "the record"
        said = problem.message if len(problem.message) <= 200 else f"{problem.message[:199]}…"
        raise LineageError(f"{path}: {where} does not fit the schema of a lineage record ({said}); it was edited.")
    return record, raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that says a key twice: other readers would take the other value."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key that is said twice")
    return made


@cache
def _validator() -> Any:
    """Return what checks a record against ``lineage.schema.json``, which is published with the package."""
    from jsonschema import Draft202012Validator

    schema = json.loads(resources.files("kd_plugin.lineage").joinpath("lineage.schema.json").read_text("utf-8"))
    return Draft202012Validator(schema)


def load_record(directory: str | Path) -> dict[str, Any]:
    """Read the record of a checkpoint, a directory or a single file, and check its digest.

    Raises:
        LineageError: missing, damaged, or its digest does not fit.
    """
    path = lineage_directory(directory) / RECORD
    record, _ = read_record(path)
    expected = _digest_or_none(record)
    if record["digest"] != expected:
        raise LineageError(f"{path} was changed: its digest is {expected}, it says {record['digest']!r}.")
    return record


def _digest_or_none(record: Mapping[str, Any]) -> str | None:
    try:
        return digest_of(record)
    except (ValueError, RecursionError):  # numbers that canonical JSON cannot hold, or surrogates
        return None


def traces_in(directory: Path, card: Mapping[str, Any], text: str) -> str | None:
    """Return the name of a file that says that a record belongs to these weights, or None.

    A copy that leaves the record behind keeps nothing of what the record said, so its own badge says too little.

    Args:
        directory: weights, or rows.
        card: front matter of its card.
        text: the whole card.
    """
    block = card.get("distillation")
    if (isinstance(block, Mapping) and "lineage" in block) or SECTION_BEGIN in text:
        return "README.md"
    for name, mark in ((NOTICE, NOTICE_HEADER), (BOM, f'"{BOM_TOOL}"')):
        path = directory / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if mark.encode() in file.read(_READ):
                    return name
    for name in (SIGNATURE, RECORD):
        if (directory / name).is_symlink() or (directory / name).exists():
            return name
    return None


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
