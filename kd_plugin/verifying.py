"""Whether an answer is the right one, for tasks whose answers can be verified: in training and in a capture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module

from kd_plugin.errors import ConfigError, MissingDependencyError, nearest

NO_MATHEMATICS, NO_ANSWER = "reference is no mathematics", "no answer"
Verifier = Callable[[str, str], bool]


def verifier(name: str) -> Verifier:
    """Return the function that compares a response with the right answer.

    Args:
        name: ``exact``: the same text but for spaces around it. ``contains``: the answer occurs in the text. ``math``:
            the last mathematical expression means the same; needs math-verify.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: ``math`` without math-verify.
    """
    if name not in _VERIFIERS:
        raise ConfigError(
            f"Unknown verify {name!r}; expected one of {', '.join(_VERIFIERS)}." + nearest(name, list(_VERIFIERS))
        )
    if name == "math":
        require_math_verify("verify='math'")
    return _VERIFIERS[name]


def same_text(response: str, answer: str) -> bool:
    """Whether two texts are equal but for white space around them."""
    return response.strip() == answer.strip()


def same_mathematics(response: str, answer: str) -> bool | str:
    """Compare as mathematics: the last answer that ``response`` gives, boxed or not, with ``answer``.

    Returns:
        Whether they mean the same, or why that cannot be said.
    """
    from math_verify import parse, verify

    # Its time limits are alarms, which only the main thread can set
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    gold = parse(answer, parsing_timeout=limit)
    if not gold:
        return NO_MATHEMATICS
    found = parse(response, parsing_timeout=limit)
    if not found:
        return NO_ANSWER
    return bool(verify(gold, found, timeout_seconds=limit))


def require_math_verify(who: str) -> None:
    """Raise MissingDependencyError, naming ``who`` needs it, where math-verify is not installed."""
    try:
        import_module("math_verify")
    except ImportError as error:
        raise MissingDependencyError(
            f"{who} needs the package math-verify. Install it: pip install 'kd-plugin[verify]'."
        ) from error


def _contains(response: str, answer: str) -> bool:
    return answer.strip() in response


def _mathematics(response: str, answer: str) -> bool:
    return same_mathematics(response, f"${answer}$") is True


_VERIFIERS: dict[str, Verifier] = {"exact": same_text, "contains": _contains, "math": _mathematics}
