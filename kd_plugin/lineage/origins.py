"""Which models a directory says that it was made from, and which models generated a dataset.

What cannot be read is unknown, and never nothing. Of the models that generated rows, what fields say decides, and what
prose says is asked about.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage.front_matter import parse_yaml
from kd_plugin.lineage.graph import EdgeKind, Evidence
from kd_plugin.lineage.readings import printable
from kd_plugin.lineage.registry import UNKNOWN, Registry

MERGE_FILES = ("mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml")
_HUBS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # a hub id, or a name without its organisation
_MAX_BASES = 50  # of one merge
_MAX_NESTING = 12

Bases = tuple[tuple[str, EdgeKind], ...]
# Fields that name writers and nothing else: any name in them counts, whoever's it is
_KEYS = frozenset(
    """generated_by generator generators generator_model generator_models generation_model generation_models teacher
    teachers teacher_model teacher_models synthesized_by source_model source_models llm written_by""".split()  # noqa: SIM905
)
# Fields, and columns of rows, that name writers among other things: a closed model or a hub id counts
_LOOSE_KEYS = frozenset({"model", "models", "model_name", "model_id", "tags"})
_COLUMNS_ONLY = frozenset({"engine", "annotator", "annotator_model", "response_model", "chosen_model"})
COLUMNS = _KEYS | _COLUMNS_ONLY | (_LOOSE_KEYS - {"tags"})  # of rows
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")
_PROVIDERS = frozenset({"openai", "anthropic", "chatgpt"})
_LINK = re.compile(r"\]\((?:[^)\s\]]|\](?!\())*+\)")  # ends where the next one begins, so that none is read twice
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_MAX_WRITERS = 20
_MAX_DEPTH = 8
_MAX_PROSE = 1 << 18  # characters of a card that are searched


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
    if isinstance(value, list | tuple) and depth < _MAX_NESTING:
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
    if depth > _MAX_NESTING:
        raise ConfigError(f"A merge that is nested deeper than {_MAX_NESTING} levels.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("model", "base_model", "source_model", "lora", "path") and isinstance(item, str):
                yield from (part.strip() for part in item.split("+") if part.strip())
            else:
                yield from _merged(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _merged(item, depth + 1)


def writers_of(card: Mapping[str, Any], registry: Registry) -> tuple[tuple[str, str], ...]:
    """Return the models that fields of a card's front matter name as writers, each with the words that name it.

    Args:
        card: front matter.
        registry: knows the models of closed APIs.
    """
    found: dict[str, str] = {}
    for key, value in _fields(card, 0):
        for name in _names(value):
            if key in _KEYS or (is_writer(name, registry) and not (key == "tags" and _HUB_ID.match(name))):
                found.setdefault(printable(name), printable(f"tag {name}" if key == "tags" else f"{key}: {name}"))
    return tuple(list(found.items())[:_MAX_WRITERS])


def writers_in_columns(
    named: Iterable[tuple[str, str]], registry: Registry
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return the models that columns of rows name as generators, and the values that name none that is known.

    Args:
        named: distinct values of columns in :data:`COLUMNS`, each with its column.
        registry: knows the models of closed APIs.
    """
    found: dict[str, str] = {}
    unread: dict[str, None] = {}
    for column, name in named:
        if is_writer(name, registry):
            found.setdefault(printable(name), printable(f"column {column}: {name}"))
        else:
            unread.setdefault(printable(f"{column}: {name}"))
    closed = sorted(found.items(), key=lambda item: registry.service_of_model(item[0]) is None)
    return tuple(closed[:_MAX_WRITERS]), tuple(list(unread)[:_MAX_WRITERS])


def is_writer(name: str, registry: Registry) -> bool:
    """Whether a name is a closed model's, or one that can be looked up."""
    return registry.service_of_model(name) is not None or _HUB_ID.match(name) is not None


def prose_of(text: str, registry: Registry) -> tuple[str, ...]:
    """Return the sentences of a card that name a closed model or its provider, whatever they say of it.

    Prose is weak evidence: it may deny, compare or praise. So it decides nothing; it makes the gate ask.
    """
    plain = unicodedata.normalize("NFKC", text[:_MAX_PROSE])
    plain = _LINK.sub("]", re.sub(r"[\u2010-\u2015\u2212]", "-", plain))
    known: dict[str, bool] = {}
    found = []
    for sentence in _SENTENCE.split(plain):
        for name in _candidates(sentence):
            if name not in known:
                known[name] = name in _PROVIDERS or registry.service_of_model(name) is not None
            if known[name]:
                found.append(printable(sentence.strip()))
                break
        if len(found) == _MAX_WRITERS:
            break
    return tuple(dict.fromkeys(found))


def _fields(card: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the fields that name writers, at any depth."""
    for key, value in card.items():
        name = str(key).strip().lower().replace("-", "_").replace(" ", "_")
        if name in _KEYS or name in _LOOSE_KEYS:
            yield name, value
        elif name == "distillation":
            continue  # of a checkpoint; its own record says who taught it
        elif isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _fields(value, depth + 1)
        elif isinstance(value, list) and depth < _MAX_DEPTH:
            for item in value:
                if isinstance(item, Mapping):
                    yield from _fields(item, depth + 1)


def _names(value: Any) -> Iterator[str]:
    """Yield names in a string, a list of strings, or mappings that hold a ``model`` or a ``name``."""
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, Mapping):
        for key in ("model", "name"):
            if isinstance(value.get(key), str):
                yield from _names(value[key])
                return
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, list):
                yield from _names(item)


def _candidates(sentence: str) -> Iterator[str]:
    """Yield words of a sentence, pairs of them joined, and their beginnings: ``GPT 4``, ``GPT-4o-generated``."""
    words = [word.strip(".,;:!?()[]{}<>'\"`*_|#~’“”") for word in re.split(r"[\s(\[|*`]+", sentence)]
    words = [re.sub(r"['’]s$", "", word).lower() for word in words if word]
    yield from words
    yield from ("-".join(pair) for pair in pairwise(words))
    for word in words:  # "GPT-4o-generated", "gpt4-based"
        if "-" in word:
            yield from (word.rsplit("-", n)[0] for n in range(1, min(4, word.count("-") + 1)))
