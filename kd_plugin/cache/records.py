"""Records of a cache: canonical JSON with its own digest, read back into dataclasses.

A record may be intact by its digest, and still say what no record may.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kd_plugin.errors import CacheCorruptionError, CacheError


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
