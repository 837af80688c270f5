"""Whether an answer is the right one, for tasks whose answers can be verified: in training and in a capture.

A capture may reject by answer, as DeepSeek-R1's distillation did (arXiv 2501.12948, 2.3.3): the teacher generates
several completions a prompt and the student learns from those alone that reach the right answer. A user's own callable
may decide instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kd_plugin.errors import ConfigError, DataError, MissingDependencyError, nearest

NO_MATHEMATICS, NO_ANSWER = "reference is no mathematics", "no answer"
Verifier = Callable[[str, str], bool]
Check = Callable[[str, Mapping[str, Any]], bool | str | None]


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

_BUILT_IN: dict[str, Callable[[str, str], bool | str]] = {"exact_match": same_text, "math_verify": same_mathematics}


@dataclass(frozen=True)
class Filter:
    """A check of completions, with the name under which the manifest counts what it drops.

    Attributes:
        name: recorded in the manifest; two captures share a directory only if it is equal.
        check: called with the completion's text and the dataset row; True or None keeps it, False drops it, and
            text drops it and is the reason that is counted.
        columns: columns that it reads; None for any.
        reason: what is counted where it returns False.
    """

    name: str
    check: Check
    columns: tuple[str, ...] | None
    reason: str

    def why_not(self, completion: str, row: Mapping[str, Any], where: str) -> str | None:
        """Return the reason for which ``completion`` is dropped, or None to keep it.

        Raises:
            DataError: the check itself failed, or returned something else; names the row.
        """
        try:
            verdict = self.check(completion, row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except Exception as error:
            raise DataError(
                f"The filter {self.name} failed at {where}: {type(error).__name__}: {error}. Nothing of its unit was "
                "stored. Let it return False for what it cannot decide."
            ) from error
        if verdict is None or verdict is True:
            return None
        if verdict is False:
            return self.reason
        if isinstance(verdict, str) and verdict:
            return verdict
        raise DataError(
            f"The filter {self.name} returned {verdict!r} at {where}; expected True to keep a completion, False or "
            "the reason as text to drop it."
        )


def make_filter(given: str | Check | Filter | None, answer_column: str = "answer") -> Filter | None:
    """Return the filter that ``given`` names.

    Args:
        given: ``exact_match``, ``math_verify``, an import path ``package.module:function``, or a callable that takes
            the completion's text and the row.
        answer_column: column of the reference, for the built-in ones.

    Raises:
        ConfigError: no such built-in filter, module or function.
        MissingDependencyError: ``math_verify`` is not installed.
    """
    if given is None or isinstance(given, Filter):
        return given
    if callable(given):
        name = f"{getattr(given, '__module__', '?')}:{getattr(given, '__qualname__', type(given).__name__)}"
        return Filter(name, given, None, "filtered")
    if given in _BUILT_IN:
        if given == "math_verify":
            require_math_verify("filter: math_verify")
        check = _Against(answer_column, _BUILT_IN[given])
        return Filter(f"{given}({answer_column})", check, (answer_column,), "wrong answer")
    module, colon, function = str(given).partition(":")
    if not colon:
        raise ConfigError(
            f"filter: {given!r} is unknown; expected one of {', '.join(_BUILT_IN)}, or the import path of a function, "
            f"`package.module:function`.{nearest(str(given), list(_BUILT_IN))}"
        )
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"filter: {given!r} cannot be imported ({error}). Is its directory in PYTHONPATH?") from error
    if not callable(found):
        raise ConfigError(f"filter: {given!r} is a {type(found).__name__}; expected a function.")
    return Filter(str(given), found, None, "filtered")


def reference(row: Mapping[str, Any], column: str) -> str:
    """Return the reference answer of a row as text.

    Raises:
        DataError: the row has none.
    """
    if row.get(column) is None:
        raise DataError(
            f"the column {column!r} with the reference answer is missing or empty; the row has {sorted(row)}. Name "
            "the right one with answer_column."
        )
    return str(row[column])


@dataclass(frozen=True)
class _Against:
    """Compares a completion with the reference answer of its row."""

    column: str
    same: Callable[[str, str], bool | str]

    def __call__(self, completion: str, row: Mapping[str, Any]) -> bool | str:
        return self.same(completion, reference(row, self.column))
