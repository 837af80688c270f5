"""What was read of a source's licence, and which of several readings counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kd_plugin.lineage.graph import Evidence
from kd_plugin.lineage.registry import UNKNOWN, Registry
from kd_plugin.lineage.voice import DECLARED, OWN, Voice, may_say_own

ITS_NAME = "its name"  # where the name of a source contradicts what was read of it
IN_PROSE = "its card, in prose"  # sentences that name a closed model
IN_ROWS = "a column of its rows"  # generators of which nothing can be looked up
OWN_SERVER = "the server is the user's own"


def read_licence(where: str, written: str, voice: Voice, registry: Registry, limit: int = 200) -> Evidence:
    """Resolve what was written, as far as this voice may say it; what is not understood is unknown.

    Args:
        where: what was read, as records name it.
        written: the words.
        voice: whose they are.
        registry: licences.
        limit: characters of the words that are kept.
    """
    resolution = registry.resolve(written, voice)
    hint = f" ({resolution.hint.strip()})" if resolution.hint and voice == "user" else ""
    return Evidence(where, printable(written + hint, limit), resolution.ids, voice)


def decide(readings: Sequence[Evidence], registry: Registry) -> tuple[tuple[str, ...], tuple[Evidence, ...]]:
    """Choose the most severe reading; the user's word stands against readings that say nothing known.

    Returns:
        Registry ids that bind, none where nothing was read; and the readings, the chosen one first.
    """
    admitted = [r if may_say_own(r.voice or "stranger") or OWN not in r.ids else _unsaid(r) for r in readings]
    counted = [r for r in admitted if r.ids]
    known = [r for r in counted if UNKNOWN not in r.ids]
    doubts = [r for r in counted if r.where == ITS_NAME]
    candidates = doubts or (known if any(r.voice == "user" for r in known) else counted)
    if not candidates:
        return (), tuple(admitted)
    chosen = max(candidates, key=lambda r: (registry.severity(r.ids), r.where == DECLARED, r.where))
    return chosen.ids, (chosen, *(r for r in admitted if r is not chosen))


def _unsaid(reading: Evidence) -> Evidence:
    return replace(reading, ids=(UNKNOWN,))


def printable(text: str, limit: int = 200) -> str:
    """Return one line of printable characters; what comes from strangers ends in terminals and files."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"
