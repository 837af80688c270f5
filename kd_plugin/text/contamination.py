"""Whether a text holds an item of an evaluation set, or nearly: by the n-grams that both have.

An item counts as found where at least a given part of its n-grams of words occurs in the text, numbers included: so a
copy with a few words changed is found, and another problem made by the same template, with other numbers, is not. Items
shorter than an n-gram are found as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugin.errors import ConfigError, DataError, require_known_keys
from kd_plugin.inputs import load_rows

_WORDS = re.compile(r"[^\W_]+|[^\w\s]")  # words, numbers, and signs each for itself: + is not - in a problem
_QUIET = frozenset(".,;:!?\"'`()[]{}$*_#\\“”‘’")
_KEYS = ("dataset", "split", "name", "columns")
# What holds the item in most evaluation sets, in this order
_COLUMNS = ("problem", "question", "prompt", "messages", "instruction", "input", "text")


@dataclass(frozen=True)
class Contamination:
    """An item of an evaluation set that a text holds.

    Attributes:
        source: the evaluation set.
        item: number of its row.
        overlap: part of the item's n-grams that the text has.
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
        self._items: list[tuple[str, int, int, str]] = []  # source, row, n-grams, how it begins
        self._index: dict[int, list[int]] = {}
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
        for gram in grams:
            self._index.setdefault(gram, []).append(len(self._items))
        self._items.append((source, number, len(grams), text.strip()[:200]))

    def find(self, text: str) -> Contamination | None:
        """Return the item of which ``text`` has the largest part, if that is large enough."""
        words, shared = words_of(text), Counter[int]()
        for n in self._lengths:
            for gram in set(_grams(words, n)):
                shared.update(self._index.get(gram, ()))
        best: Contamination | None = None
        for item, count in shared.items():
            source, number, grams, begins = self._items[item]
            if count / grams >= self._overlap and (best is None or count / grams > best.overlap):
                best = Contamination(source, number, count / grams, begins)
        return best


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
        text = " ".join(words[start : start + n])
        yield int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
