"""Recognising a licence by its text."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from kd_plugin.lineage.registry import Registry

_RESEMBLES = 0.8  # share of three-word runs in common, above which a difference is worth naming
_SAME = 0.95  # above which a text is the licence, if what differs could not change what it asks
_COPYRIGHT = re.compile(r"^\W*(copyright\b|\(c\)|©)", re.IGNORECASE)
# One short sentence with one of these makes another licence of a known one.
_OPERATIVE = frozenset(
    """
    not no non must may shall only except unless cannot without permission commercial commercially noncommercial
    research academic military million prohibit prohibited forbid forbidden restrict restricted restriction revoke
    terminate train training distill distillation improve
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Match:
    """What a licence text is.

    Attributes:
        id: registry entry, or None where nothing matches well enough.
        says: for people: the licence's name, or what it resembles and how it differs.
    """

    id: str | None
    says: str


def copyright_lines(text: str) -> tuple[str, ...]:
    """Return the lines that name a copyright holder: they must travel with the licence."""
    lines = (" ".join(line.split())[:300] for line in text.splitlines()[:400])
    named = (line.strip("*/# ") for line in lines if _COPYRIGHT.match(line) and re.search(r"\d{4}", line))
    return tuple(dict.fromkeys(named))[:50]


def recognise(text: str, registry: Registry) -> Match:
    """Compare a text with every text of the registry.

    Layout, case, punctuation and copyright lines do not count. A text that differs in little is the licence only if
    no word of what differs could change what it asks: "MIT, but not for commercial use" is not MIT.
    """
    words = _words(text)
    runs = _runs(words)
    total = runs.total()
    best, best_score = None, 0.0
    for terms_id in sorted(registry.terms):
        known = registry.text(terms_id)
        if known is None:
            continue
        if words == _words(known):
            return Match(terms_id, registry.terms[terms_id].name)
        other = _runs(_words(known))
        if 2 * min(total, other.total()) < _RESEMBLES * (total + other.total()):
            continue  # of such different lengths that they cannot resemble each other
        score = _share(runs, other)
        if score > best_score:
            best, best_score = terms_id, score
    if best is None or best_score < _RESEMBLES:
        return Match(None, "a text that no registry entry matches")
    differing = _differing(words, _words(registry.text(best) or ""))
    if best_score >= _SAME and not _OPERATIVE & set(differing) and _asks_the_same(text, best, registry):
        return Match(best, registry.terms[best].name)
    shown = " ".join(differing[:12])
    return Match(None, f"a text that resembles {registry.terms[best].name} and differs by: {shown}")


def _asks_the_same(text: str, terms_id: str, registry: Registry) -> bool:
    """Whether a text has the amounts of an entry's text, and in quotation marks what the entry says is to be shown."""
    reference = registry.text(terms_id) or ""
    shown = [clause.value for clause in registry.terms[terms_id].clauses if clause.value]
    kept = all(_quotes(text, value) for value in shown if _quotes(reference, value))
    return kept and _amounts(_words(text)) == _amounts(_words(reference))


def _quotes(text: str, value: str) -> bool:
    pattern = r"\s+".join(re.escape(word) for word in value.split())
    return re.search(rf"{pattern}\s*[\"\u201d\u2019']", text, re.IGNORECASE) is not None


def _amounts(words: tuple[str, ...]) -> Counter[tuple[str, str]]:
    return Counter(pair for pair in pairwise(words) if pair[1] in ("million", "billion"))


def _differing(mine: tuple[str, ...], reference: tuple[str, ...]) -> list[str]:
    matcher = difflib.SequenceMatcher(None, mine, reference, autojunk=len(mine) > 2000)
    changes = [op for op in matcher.get_opcodes() if op[0] != "equal"]
    return [word for _, i, j, k, m in changes for word in (*mine[i:j], *reference[k:m])]


def _share(mine: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    total = mine.total() + other.total()
    return 2 * (mine & other).total() / total if total else 0.0


@cache
def _runs(words: tuple[str, ...]) -> Counter[tuple[str, ...]]:
    return Counter(zip(words, words[1:], words[2:], strict=False))


@cache
def _words(text: str) -> tuple[str, ...]:
    lines = [line for line in text.splitlines() if not _COPYRIGHT.match(line)]
    return tuple(re.findall(r"[a-z0-9]+", " ".join(lines).lower()))
