"""Which models a directory says that it was made from. What cannot be read is unknown, and never nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage.graph import EdgeKind, Evidence
from kd_plugin.lineage.readings import printable
from kd_plugin.lineage.registry import UNKNOWN
from kd_plugin.lineage.strict_yaml import parse_yaml

MERGE_FILES = ("mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml")
_HUBS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # a hub id, or a name without its organisation
_MAX_BASES = 50  # of one merge
_MAX_DEPTH = 12

Bases = tuple[tuple[str, EdgeKind], ...]


def bases_of(
    card: Mapping[str, Any], adapter: str | None, merges: Mapping[str, str | None], where: str
) -> tuple[Bases, list[Evidence]]:
    """Return the models behind a directory, with the kind of edge, and a reading for each that cannot be read.

    Args:
        card: front matter of its card.
        adapter: text of its ``adapter_config.json``, or None.
        merges: text of each of :data:`MERGE_FILES` that is there; None for one that is too large or leads elsewhere.
        where: the directory's name, for messages.

    Raises:
        LineageError: ``adapter_config.json`` is not valid JSON.
    """
    found: dict[str, EdgeKind] = {}
    unread: list[Evidence] = []
    for name in _adapter_bases(adapter, where):
        found.setdefault(printable(name), "adapter_of")
    for file, text in merges.items():
        try:
            names = list(_merged(parse_yaml((text or "").encode("utf-8", "replace"), file), 0))
        except ConfigError:
            names = []  # malformed, or deeper than is read
        if text is None or not names or len(names) > _MAX_BASES:
            unread.append(Evidence(file, "a merge whose models cannot be read", (UNKNOWN,)))
        for name in names[:_MAX_BASES]:
            found.setdefault(printable(base_name(name) or name), "merged_from")
    listed = list(_listed(card.get("base_model"), 0))
    names = list(dict.fromkeys(base for one in listed if isinstance(one, str) and (base := _base(one))))
    kind: EdgeKind = "merged_from" if len(names) > 1 else "initialized_from"
    for one in names[:_MAX_BASES]:
        found.setdefault(one, kind)
    if len(names) > _MAX_BASES:
        unread.append(Evidence("README.md", f"{len(names)} models as base_model, more than are read", (UNKNOWN,)))
    for one in listed:
        if not isinstance(one, str) or _base(one) is None:
            unread.append(Evidence("README.md", printable(f"base_model that cannot be read: {one!r}", 100), (UNKNOWN,)))
    return tuple(found.items()), unread[:_MAX_BASES]


def _base(written: str) -> str | None:
    """Return what a card calls its base: a directory of this machine, a hub id, or a name; None for anything else."""
    text = written.strip()
    is_here = text.startswith(("/", "./", "../")) and Path(text).is_dir()
    return text if is_here else base_name(text)


def base_name(written: str) -> str | None:
    """Return the hub id or name in what a card calls its base, such as a URL of the hub; None where it is neither."""
    text = written.strip().strip("`'\"").rstrip("/")
    begins = re.match(r"(?:https?:)?//", text, re.IGNORECASE)
    if begins or text.split("/")[0].lower() in _HUBS:
        try:
            parts = urlsplit(text if begins else f"//{text}")
        except ValueError:
            return None
        if (parts.hostname or "") not in _HUBS:
            return None
        text = "/".join(parts.path.strip("/").removeprefix("models/").split("/")[:2])
    text = re.sub(r"(?<=\w)@[\w.-]+$", "", text)
    return text if _NAME.fullmatch(text) else None


def _adapter_bases(text: str | None, where: str) -> Iterator[str]:
    if text is None:
        return
    try:
        adapter = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineageError(f"adapter_config.json in {where!r} is not valid JSON: {error}.") from error
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, Mapping) else None
    if isinstance(base, str) and base.strip():
        yield base.strip()


def _listed(value: Any, depth: int) -> Iterator[Any]:
    """Yield what a field lists: a name, a list of names, or mappings that hold one; whatever else as it is."""
    if value is None:
        return
    if isinstance(value, list | tuple) and depth < _MAX_DEPTH:
        for item in value:
            yield from _listed(item, depth + 1)
    elif isinstance(value, Mapping):
        inner = [value[key] for key in ("name", "model", "id", "repo", "path") if value.get(key) is not None]
        if inner and all(isinstance(one, str) for one in inner):
            yield from inner
        else:
            yield dict(value)
    else:
        yield value


def _merged(value: Any, depth: int) -> Iterator[str]:
    """Yield the models that a merge's configuration names, whatever its method; ``base+lora`` are two.

    Raises:
        ConfigError: it is so deep that models in it would be missed.
    """
    if depth > _MAX_DEPTH:
        raise ConfigError(f"A merge that is nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("model", "base_model", "source_model", "lora", "path") and isinstance(item, str):
                yield from (part.strip() for part in item.split("+") if part.strip())
            else:
                yield from _merged(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _merged(item, depth + 1)
