"""Whether a text holds an item of an evaluation set, or nearly: by the n-grams that both have.

An item counts as found where at least a given part of its n-grams of words occurs in the text, and most of its numbers.
An n-gram that several items have, such as one of a template, counts once for all of them. So a copy with a few words
changed is found, and another problem made by the same template, with other numbers or names, is spared. Items
shorter than an n-gram are found as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugin.errors import ConfigError, DataError, require_known_keys
from kd_plugin.inputs import load_rows

_WORDS = re.compile(r"[^\W_]+|[^\w\s]")  # words, numbers, and signs each for itself: + is not - in a problem
_QUIET = frozenset(".,;:!?\"'`()[]{}$*_#\\“”‘’")
_NUMBERS = 0.6  # part of an item's numbers that a copy has
_COMMON = 100  # items beyond which an n-gram is the set's own phrase
_KEYS = ("dataset", "split", "name", "columns")
# What holds the item in most evaluation sets, in this order
_COLUMNS = ("problem", "question", "prompt", "messages", "instruction", "input", "text")


@dataclass(frozen=True)
class Contamination:
    """An item of an evaluation set that a text holds.

    Attributes:
        source: the evaluation set.
        item: number of its row.
        overlap: part of the item's n-grams that the text has, each by its weight.
        text: how the item begins.
    """

    source: str
    item: int
    overlap: float
    text: str


class EvaluationItems:
    """The n-grams of evaluation sets, to be looked for in texts.

    Args:
        ngram: words of an n-gram.
        overlap: part of an item's n-grams from which it counts as found.
    """

    def __init__(self, ngram: int, overlap: float) -> None:
        self._n, self._overlap = ngram, overlap
        self._items: list[_Item] = []
        self._index: dict[int, list[int]] = {}
        self._known: set[int] = set()
        self._lengths: set[int] = set()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, source: str, number: int, text: str) -> None:
        """Add an item."""
        words = words_of(text)
        if not words:
            return
        n = min(self._n, len(words))
        grams = set(_grams(words, n))
        self._lengths.add(n)
        if _digest(words) in self._known:
            return
        self._known.add(_digest(words))
        for gram in grams:
            self._index.setdefault(gram, []).append(len(self._items))
        self._items.append(_Item(source, number, tuple(grams), _numbers(words), text.strip()[:200]))

    def find(self, text: str) -> Contamination | None:
        """Return the item of which ``text`` has the largest part, if that is large enough."""
        words, shared = words_of(text), defaultdict[int, float](float)
        for n in self._lengths:
            for gram in set(_grams(words, n)):
                for place in self._index.get(gram, ()) if self._weight(gram) else ():
                    shared[place] += self._weight(gram)
        best, numbers = None, _numbers(words)
        for place, weight in shared.items():
            item = self._items[place]
            part = weight / sum(map(self._weight, item.grams))
            same = len(item.numbers & numbers) >= _NUMBERS * len(item.numbers)
            if same and part >= self._overlap and (best is None or part > best.overlap):
                best = Contamination(item.source, item.number, min(part, 1.0), item.begins)
        return best

    def _weight(self, gram: int) -> float:
        """Return what an n-gram counts for each item that has it; nothing where very many have it."""
        having = len(self._index.get(gram, ()))
        return 1 / having if 0 < having <= _COMMON else 0.0


@dataclass(frozen=True)
class _Item:
    source: str
    number: int
    grams: tuple[int, ...]
    numbers: frozenset[str]
    begins: str


def _numbers(words: Sequence[str]) -> frozenset[str]:
    return frozenset(word for word in words if word[0].isdigit())


def words_of(text: str) -> list[str]:
    """Return the words, numbers and signs of a text, without case and without punctuation."""
    return [word for word in _WORDS.findall(text.lower()) if word not in _QUIET]


def load_items(sets: Sequence[Any], ngram: int, overlap: float) -> EvaluationItems:
    """Read evaluation sets.

    Args:
        sets: names as :func:`~kd_plugin.inputs.load_rows` takes them, or mappings with ``dataset``, ``split``
            (``test`` where it is left out, else ``train``), ``name`` and ``columns``.
        ngram: words of an n-gram.
        overlap: see :class:`EvaluationItems`.

    Raises:
        ConfigError: an unknown key.
        DataError: a set cannot be read, or has no column that holds its items.
    """
    items = EvaluationItems(ngram, overlap)
    for given in sets:
        options = {"dataset": given} if isinstance(given, str) else dict(given)
        require_known_keys(options, _KEYS, "decontaminate")
        if not options.get("dataset"):
            raise ConfigError(f"decontaminate: {given!r} names no dataset.")
        rows = _rows(options)
        for number, row in enumerate(rows):
            for text in _texts(row, options):
                items.add(str(options["dataset"]), number, text)
    return items


def _rows(options: Mapping[str, Any]) -> Any:
    name, split = options["dataset"], options.get("split")
    if split is not None:
        return load_rows(name, split=split, name=options.get("name"))
    try:
        return load_rows(name, split="test", name=options.get("name"))
    except DataError:
        return load_rows(name, name=options.get("name"))


def _texts(row: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    columns = options.get("columns") or [name for name in _COLUMNS if row.get(name)][:1]
    missing = [name for name in columns if name not in row]
    if missing or not columns:
        wanted = missing[0] if missing else " or ".join(_COLUMNS)
        raise DataError(
            f"The evaluation set {options['dataset']!r} has no column {wanted}; it has {', '.join(row)}. Name "
            "the columns that hold its items: columns: [...]."
        )
    for name in columns:
        value = row[name]
        if isinstance(value, str):
            yield value
        elif isinstance(value, Iterable):
            said = [m for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
            yield " ".join(str(m.get("content", "")) for m in said)


def _grams(words: Sequence[str], n: int) -> Iterator[int]:
    for start in range(len(words) - n + 1):
        yield _digest(words[start : start + n])


def _digest(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")
