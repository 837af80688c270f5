"""Where a card's front matter begins and ends, as the hub sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The hub takes a byte-order mark, blank lines and other line ends before and inside; what it reads must not be hidden.
# Two expressions, since one for both marks takes cubic time where a card has many blank lines.
_BEGUN = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]")
_ENDED = re.compile(r"[\r\n]---[ \t]*(?:\r?\n|\r|\Z)")


@dataclass(frozen=True)
class Front:
    """The front matter of a card.

    Attributes:
        yaml: what is between the marks, without blank lines at either end.
        end: where the card goes on behind the second mark.
    """

    yaml: str
    end: int


def find_front(text: str) -> Front | None:
    """Return the front matter of a card, or None where there is none, or no end of it."""
    begun = _BEGUN.match(text)
    ended = _ENDED.search(text, begun.end()) if begun else None
    if begun is None or ended is None:
        return None
    return Front(text[begun.end() : ended.start()].strip("\r\n"), ended.end())


def front_of(text: str) -> str | None:
    """Return the YAML between the marks, or None where there is none, or no end of it."""
    front = find_front(text)
    return None if front is None else front.yaml


def has_begun(text: str) -> bool:
    """Whether front matter begins, be it that it never ends."""
    return _BEGUN.match(text) is not None
