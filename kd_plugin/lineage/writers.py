"""Which models wrote a dataset: what fields say decides, what prose says is asked about."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from kd_plugin.lineage.readings import printable
from kd_plugin.lineage.registry import Registry

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
