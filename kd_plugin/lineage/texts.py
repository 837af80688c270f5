"""Recognising a licence by its text."""

from __future__ import annotations

import difflib
import re
from functools import cache

from kd_plugin.lineage.registry import Registry

_SAME = 0.9  # share of matching words, in order, above which two texts are one licence
_COPYRIGHT = re.compile(r"^\W*(copyright\b|\(c\)|©)", re.IGNORECASE)


def copyright_lines(text: str) -> tuple[str, ...]:
    """Return the lines that name a copyright holder: they must travel with the licence."""
    lines = (" ".join(line.split())[:300] for line in text.splitlines()[:400])
    named = (line.strip("*/# ") for line in lines if _COPYRIGHT.match(line) and re.search(r"\d{4}", line))
    return tuple(dict.fromkeys(named))[:50]


def recognise(text: str, registry: Registry) -> str | None:
    """Return the id of the registry entry whose text this is, or None.

    Layout, case, punctuation and copyright lines do not count; a share of 0.9 of the words must agree in order,
    so that an added clause of some length makes it another licence.
    """
    words = _words(text)
    best, best_score = None, _SAME
    for terms_id in sorted(registry.terms):
        known = registry.text(terms_id)
        if known is None:
            continue
        reference = _words(known)
        if words == reference:
            return terms_id
        # The quick bound rules out almost all entries before the slow comparison.
        matcher = difflib.SequenceMatcher(None, words, reference, autojunk=False)
        if matcher.real_quick_ratio() > best_score and matcher.quick_ratio() > best_score:
            score = matcher.ratio()
            if score > best_score:
                best, best_score = terms_id, score
    return best


@cache
def _words(text: str) -> tuple[str, ...]:
    lines = [line for line in text.splitlines() if not _COPYRIGHT.match(line)]
    return tuple(re.findall(r"[a-z0-9]+", " ".join(lines).lower()))
