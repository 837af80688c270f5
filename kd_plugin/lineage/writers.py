"""Which models a dataset's card names as its writers: in its front matter, its tags, or its own sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from kd_plugin.lineage.registry import Registry

_KEYS = ("generated_by", "generator", "generators", "teacher", "teachers", "teacher_model")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_MADE_BY = re.compile(
    r"\b(?:generat\w*|creat\w*|produc\w*|written|wrote|synthes\w*|distil\w*|annotat\w*|label\w*|translat\w*|rewr\w*|"
    r"answer\w*|respon\w*|complet\w*|output\w*|collect\w*|sampled)\b.{0,80}?\b(?:by|with|using|from|via|of)\b(.{1,100})",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not?|never|without|none|n't)\b|n't\b", re.IGNORECASE)
_MAX_WRITERS = 20


def writers_of(card: Mapping[str, Any], text: str, registry: Registry) -> tuple[tuple[str, str], ...]:
    """Return the models that a card names as writers, each with the words that name it.

    Front matter may name any model. Tags and sentences count only for models that a closed API alone offers: other
    names are too like words. A sentence that negates does not count.

    Args:
        card: front matter.
        text: the whole card.
        registry: knows the models of closed APIs.
    """
    found: dict[str, str] = {}
    for key in _KEYS:
        for name in _names(card.get(key)):
            found.setdefault(name, f"{key}: {name}")
    for tag in _names(card.get("tags")):
        if registry.service_of_model(tag):
            found.setdefault(tag, f"tag {tag}")
    for sentence in _SENTENCE.split(text):
        made = _MADE_BY.search(sentence)
        if made is None or _NEGATED.search(sentence[: made.start(1)]):
            continue
        for name in _candidates(made[1]):
            if registry.service_of_model(name):
                found.setdefault(name, sentence.strip())
    return tuple(list(found.items())[:_MAX_WRITERS])


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


def _candidates(tail: str) -> Iterator[str]:
    """Yield words of a sentence, and pairs of them joined: ``GPT 4`` is written in many ways."""
    words = [word.strip(".,;:!?()[]{}<>'\"`*_’“”") for word in re.split(r"[\s(\[]+", tail)]
    words = [re.sub(r"['’]s$", "", word).lower() for word in words if word]
    yield from words
    yield from ("-".join(pair) for pair in pairwise(words))
