"""Where a card's front matter begins and ends, as the hub sees it."""

from __future__ import annotations

import re

# The hub takes a byte-order mark, blank lines and other line ends before and inside; what it reads must not be hidden.
FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]+(.*?)[\r\n]+---[ \t]*(?:\r?\n|\r|\Z)", re.DOTALL)
_BEGUN = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]")


def front_of(text: str) -> str | None:
    """Return the YAML between the marks, or None where there is none, or no end of it."""
    match = FRONT.match(text)
    return None if match is None else match[1]


def has_begun(text: str) -> bool:
    """Whether front matter begins, be it that it never ends."""
    return _BEGUN.match(text) is not None
