"""Every error that the package raises on purpose.

Each kind is also a kind of the standard library, so that code which knows nothing of this package still
catches it. Messages say what was seen, what was expected, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LISTED = 240  # characters of known keys that a message names


class KDError(Exception):
    """Base of all errors raised by kd-plugin."""


class ConfigError(KDError, ValueError):
    """A setting is wrong, or two settings contradict each other."""


class UsageError(ConfigError):
    """What a user typed or wrote into a file cannot be read as settings; the command's exit code is 2.

    Args:
        message: what was seen, with file, line and key where there are such, and what was expected.
        command: the command as it is typed, whose ``--help`` says more; empty if the message says all.
    """

    exit_code = 2

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(message)
        self.command = command


class DataError(KDError, ValueError):
    """A dataset lacks a column, or a row cannot be used."""


class VocabularyError(KDError, ValueError):
    """Two models, or a model and a cache, do not speak the same token ids."""


class CacheError(KDError, OSError):
    """A teacher cache cannot be read or written."""


class CacheCorruptionError(CacheError):
    """A file of a teacher cache differs from what its manifest promises."""


class LineageError(KDError, ValueError):
    """Lineage files are missing, unreadable or do not fit together."""


class LicenseRefusedError(KDError, PermissionError):
    """The terms of a source forbid what the run would do."""


class ServerError(KDError, ConnectionError):
    """A teacher's server is away, refuses a request, or answers something else than was asked."""


class NonFiniteError(KDError, ArithmeticError):
    """A loss or a target is NaN or infinite."""


class MissingDependencyError(KDError, ImportError):
    """An optional package is needed and not installed."""


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_known_keys(keys: Iterable[object], known: Sequence[str], where: str, prefix: str = "") -> None:
    """Refuse a key that nothing takes: a key that is misspelt would be a setting that is lost.

    Args:
        keys: what was given.
        known: what there is.
        where: what the message calls the place.
        prefix: of a key in the message, such as ``"--model."``.

    Raises:
        ConfigError: names the first unknown key, the nearest known one and, if they are few, all of them.
    """
    for key in keys:
        if key not in known:
            listed = f" Known: {', '.join(known)}." if len(", ".join(known)) <= _LISTED else ""
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}.{nearest(str(key), list(known))}{listed}")
