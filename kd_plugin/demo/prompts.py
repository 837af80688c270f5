"""The questions that the demo bundles, in two domains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

MATH, GENERAL = "math", "general"
DOMAINS = (MATH, GENERAL)


@dataclass(frozen=True)
class Question:
    """A prompt of the demo.

    Attributes:
        domain: ``math`` (problems from reasoning-gym) or ``general``; names the teacher that judges it.
        text: what the user asks.
        answer: the known answer of a math problem, from which the math teacher learns; None in ``general``.
    """

    domain: str
    text: str
    answer: str | None = None

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question as a conversation, the form of TRL's ``prompt`` column."""
        return [{"role": "user", "content": self.text}]


def questions(split: str, domain: str, limit: int) -> list[Question]:
    """Return the first ``limit`` bundled questions of a domain; ``split`` is ``train`` or ``held_out``."""
    if domain == MATH:
        rows = _bundle("arithmetic.json")[split]
        return [Question(MATH, row["question"], row["answer"]) for row in rows[:limit]]
    return [Question(GENERAL, text) for text in _bundle("general.json")[split][:limit]]


def available(split: str, domain: str) -> int:
    """How many questions of a domain are bundled."""
    return len(_bundle("arithmetic.json" if domain == MATH else "general.json")[split])


@cache
def _bundle(name: str) -> dict[str, Any]:
    return json.loads((files("kd_plugin.demo") / "data" / name).read_text(encoding="utf-8"))
