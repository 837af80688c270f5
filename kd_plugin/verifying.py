"""Whether a written answer is the right one, for tasks whose answers can be verified."""

from __future__ import annotations

from collections.abc import Callable

from kd_plugin.errors import ConfigError, MissingDependencyError, nearest

Verifier = Callable[[str, str], bool]


def verifier(name: str) -> Verifier:
    """Return the function that compares what was written with the right answer.

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
        _require_math_verify()
    return _VERIFIERS[name]


def _exact(written: str, answer: str) -> bool:
    return written.strip() == answer.strip()


def _contains(written: str, answer: str) -> bool:
    return answer.strip() in written


def _math(written: str, answer: str) -> bool:
    from math_verify import parse, verify

    # Its own time limit uses signals, which only a main thread may set
    gold = parse(f"${answer}$", parsing_timeout=None)
    return bool(verify(gold, parse(written, parsing_timeout=None), timeout_seconds=None))


_VERIFIERS: dict[str, Verifier] = {"exact": _exact, "contains": _contains, "math": _math}


def _require_math_verify() -> None:
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("verify='math' needs math-verify: pip install 'kd-plugin[verify]'.") from error
