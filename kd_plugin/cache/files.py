"""Files that several processes share, and records that show a flipped byte.

A name appears only when the whole file is on the disk, and each file in progress has an owner. Workers share a
directory across machines, containers and reboots, so neither a host's name nor a process id says who lives: machines
may have equal names, and ids are used again. A process is only taken for gone where it ran under this very kernel and
in this process's own namespace of process ids; of all others, age or heartbeat decides.

A record is canonical JSON with its own digest, read back into a dataclass. It may be intact by its digest, and still
say what no record may.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import types
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kd_plugin.errors import CacheCorruptionError, CacheError

_DAY_SECONDS = 86_400
_MARK = re.compile(r"(?:(?P<place>[0-9a-f]{12})-(?P<started>\d+)-)?[0-9a-f]{8}")


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, durably: file to disk, rename, directory to disk."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def publish_new(temporary: Path, final: Path) -> bool:
    """As :func:`publish`, but leave a file of that name alone; say whether ours was taken.

    A hard link appears whole or not at all and never replaces; where the file system has none, the rename may
    replace a file that another worker made in the same instant, with the same content.
    """
    sync(temporary)
    try:
        os.link(temporary, final)
    except FileExistsError:
        temporary.unlink()
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        if final.exists():
            temporary.unlink()
            return False
        os.replace(temporary, final)
    else:
        temporary.unlink()
    sync(final.parent)
    return True


def sync(path: Path) -> None:
    """Wait until ``path``, a file or a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; the rename is then as durable as they make it.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explained(what: str, way_out: str) -> Iterator[None]:
    """Turn the operating system's refusals to write into one clear error.

    Args:
        what: what was being done, as in "storing unit 3 in DIR".
        way_out: what is safe, and what to do.
    """
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.ENOTDIR: "a file is where a directory is needed",
            errno.EEXIST: "a file is where a directory is needed",
        }
        if error.errno not in reasons:
            raise
        raise CacheError(f"{what} failed: {reasons[error.errno]} ({error}). {way_out}") from error


@dataclass(frozen=True)
class Owner:
    """A process that made a file.

    Attributes:
        host: its host's name as it stands in files; for people, and to tell machines apart where ``place`` is None.
        pid: its process id.
        place: names the running kernel and the namespace of process ids; None in files of earlier versions.
        started: clock ticks from the kernel's start to that of the process; 0 where the system does not say.
    """

    host: str
    pid: int
    place: str | None = None
    started: int = 0

    @property
    def gone(self) -> bool:
        """Whether the process has certainly ended; False also where that cannot be told from here."""
        here = self.host == _host() if self.place is None else self.place == _place()
        if not here:
            return False
        if not _exists(self.pid):
            return True
        started = _started(self.pid)
        return started is None or bool(self.started and started and started != self.started)


def this_process() -> Owner:
    """Return the calling process."""
    return Owner(_host(), os.getpid(), _place(), _started(os.getpid()) or 0)


def temporary_name(directory: Path, stem: str) -> Path:
    """Return a name in ``directory`` that no other process on any host uses."""
    own = this_process()
    return directory / f"{stem}.{own.host}.{own.pid}.{own.place}-{own.started}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files and directories of processes that are gone, and of any process after a day.

    What has no name of :func:`temporary_name` is left alone. A day passes by the file system's clock, since hosts
    differ in theirs. Others may be removing or renaming the same files.
    """
    found = [(path, owner) for path in sorted(directory.iterdir()) if (owner := _owner_of_name(path.name))]
    doubtful = [path for path, owner in found if not owner.gone and owner.place != _place()]
    now = _file_system_time(directory) if doubtful else 0.0
    for path, owner in found:
        with contextlib.suppress(FileNotFoundError):  # its owner gave it its final name, or another was quicker
            if owner.gone or (path in doubtful and now - path.stat().st_mtime > _DAY_SECONDS):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory that others may be removing at the same time."""
    while path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


def claim_text(owner: Owner) -> str:
    """Return what the file of a claim holds."""
    return f"{owner.host} {owner.pid} {owner.place} {owner.started}\n"


def read_claim(text: str) -> Owner | None:
    """Return the owner that :func:`claim_text` wrote, this version's or an earlier one's; None for anything else."""
    match text.split():
        case [host, pid] if pid.isdecimal():
            return Owner(host, int(pid))
        case [host, pid, place, started] if pid.isdecimal() and started.isdecimal():
            return Owner(host, int(pid), place, int(started))
    return None


def _owner_of_name(name: str) -> Owner | None:
    """Read a name of :func:`temporary_name`; the host's own name may hold dots, the stem too."""
    rest, _, mark = name.rpartition(".")
    rest, _, pid = rest.rpartition(".")
    found = _MARK.fullmatch(mark)
    if not rest or not pid.isdecimal() or found is None:
        return None
    # Only where stem ends and host begins is open; a name that ends in this host's is of this host
    host = _host() if rest.endswith(f".{_host()}") else rest
    return Owner(host, int(pid), found["place"], int(found["started"] or 0))


def _host() -> str:
    """Return the host's name, fit for a file's: a host may be called anything."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64] or "_"


@cache
def _place() -> str:
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux: the machine's hardware address, and no namespaces
        kernel, namespace = f"{uuid.getnode():x}", ""
    return hashlib.sha256(f"{kernel} {namespace}".encode()).hexdigest()[:12]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks; 0 where the system does not say, None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    # Fields 3 and 22 of proc(5), counted from behind the command's name; Z has ended and nobody has asked how
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _file_system_time(directory: Path) -> float:
    probe = temporary_name(directory, "clock")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def fitting(kind: type, values: Any, where: str, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the values of a JSON object as arguments of a dataclass, each of the type that its field has.

    Args:
        kind: a dataclass of plain values, mappings and tuples.
        values: the JSON object.
        where: what messages call it.
        ignored: fields of other types, which are passed on as they are.

    Raises:
        CacheError: no object, a field that is missing, unknown, or of another type; a negative count.
    """
    if not isinstance(values, Mapping):
        raise CacheError(f"{where} is {_shown(values)}; expected a mapping. It was not written by kd-plugin.")
    hints = get_type_hints(kind)
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    wrong = [f"{name!r} is no field of it" for name in sorted(values.keys() - hints.keys())]
    wrong += [f"{name!r} is missing" for name in sorted(needed - values.keys())]
    if wrong:
        raise CacheError(f"{where}: {wrong[0]}. It was not written by kd-plugin, or by a newer one.")
    made = {}
    for name, value in values.items():
        if name not in ignored and not _fits(value, hints[name]):
            raise CacheError(f"{where}.{name} is {_shown(value)}; expected {_words(hints[name])}.")
        if isinstance(value, int) and value < 0 and name != "seed":
            raise CacheError(f"{where}.{name} is {value}; expected 0 or more.")
        made[name] = tuple(value) if isinstance(value, list) else value
    return made


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values())
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:79]}…"


def seal(values: Mapping[str, Any]) -> bytes:
    """Return ``values`` as the bytes of a record, its digest added."""
    return (json.dumps({**values, "digest": record_digest(values)}, indent=1, ensure_ascii=True) + "\n").encode()


def unseal(path: Path, way_out: str) -> dict[str, Any]:
    """Read a record that :func:`seal` made.

    Args:
        path: the file.
        way_out: what the message advises when it is damaged.

    Raises:
        CacheCorruptionError: a byte differs from what was written.
    """
    data = path.read_bytes()
    try:
        values = json.loads(data)
        stored = values.pop("digest")
        intact = stored == record_digest(values) and seal(values) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CacheCorruptionError(f"{path} is not as it was written: its digest does not match. {way_out}")
    return values


def record_digest(values: Any) -> str:
    """Return the sha256 of ``values`` as canonical JSON (RFC 8785)."""
    import rfc8785

    return hashlib.sha256(rfc8785.dumps(values)).hexdigest()
