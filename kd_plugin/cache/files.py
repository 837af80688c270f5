"""Writing that survives a crash: a name appears only when the whole file is on the disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_plugin.errors import CacheError

_BLOCK = 1 << 20


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


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
        }
        if error.errno not in reasons:
            raise
        raise CacheError(f"{what} failed: {reasons[error.errno]} ({error}). {way_out}") from error
