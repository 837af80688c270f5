"""What a teacher's reply says: read strictly, so that what is not clear counts as nothing.

A reply that ends in another form than the one that was asked for, that repeats it with other numbers, that was cut by
the limit, or that lacks the key of its request, says nothing. The reason is returned for the log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BEST = 10  # the highest score of the rubric


@dataclass(frozen=True)
class Parsed:
    """What was read of an evaluation; or why nothing was.

    Attributes:
        score: in [0, 1]; None where the reply says nothing.
        first_wrong: number of the first step that is wrong, from 1; None where none is named.
        problem: why the reply says nothing; empty where it does.
    """

    score: float | None = None
    first_wrong: int | None = None
    problem: str = ""


def verdict_pattern(key: str, steps: int | None = None) -> str:
    """Return the regular expression of the line that an evaluation ends with; what a guided server is held to.

    Args:
        key: of the request.
        steps: number of steps of the response, of which one may be named; None for any number.
    """
    step = "[0-9]{1,3}" if steps is None else "|".join(map(str, range(steps + 1)))
    return rf"Verdict {key}: score=(10|[0-9]) first_wrong_step=({step})"


def correction_pattern(key: str, characters: int) -> str:
    """Return the regular expression of a correction; what a guided server is held to.

    Args:
        key: of the request.
        characters: of each of the text's four lines at most, so that the reply comes to its end.
    """
    line = rf"[^\nBE][^\n]{{0,{characters}}}"  # no line that begins like the two around the text
    return rf"BEGIN {key}\n{line}(\n{line}){{0,3}}\nEND {key}"


def parse_evaluation(reply: str, key: str, steps: int, *, finished: bool = True) -> Parsed:
    """Read an evaluation.

    Args:
        reply: the teacher's text.
        key: of the request.
        steps: number of steps of the response.
        finished: False where the limit cut the reply.
    """
    if not finished:
        return Parsed(problem="the reply was cut by the limit")
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    own = [line for line in lines if key in line]
    if not own:
        return Parsed(problem="no verdict with the key of the request")
    if len(own) > 1:
        return Parsed(problem="the key of the request comes more than once")
    found = re.fullmatch(verdict_pattern(key), own[0], flags=re.ASCII)
    if found is None:
        return Parsed(problem=f"the verdict has another form: {own[0][:80]!r}")
    if lines[-1] != own[0]:
        return Parsed(problem="text follows the verdict")
    score, step = int(found.group(1)), int(found.group(2))
    if step > steps:
        return Parsed(problem=f"step {step} of a response of {steps}")
    return Parsed(score / BEST, step or None)


def parse_correction(reply: str, key: str, *, finished: bool = True) -> tuple[str | None, str]:
    """Read a correction: what stands between the two lines that carry the key.

    Args:
        reply: the teacher's text.
        key: of the request.
        finished: False where the limit cut the reply.

    Returns:
        The text and an empty reason; or None and the reason.
    """
    if not finished:
        return None, "the reply was cut by the limit"
    lines = reply.strip().split("\n")
    begin, end = f"BEGIN {key}", f"END {key}"
    marked = [(number, line.strip()) for number, line in enumerate(lines) if key in line]
    if [line for _, line in marked] != [begin, end]:
        return None, f"expected one line {begin!r} and after it one line {end!r}"
    if any(line.strip() for line in lines[marked[1][0] + 1 :]):
        return None, "text follows the correction"
    text = "\n".join(lines[marked[0][0] + 1 : marked[1][0]])
    return (text, "") if text.strip() else (None, "the correction is empty")
