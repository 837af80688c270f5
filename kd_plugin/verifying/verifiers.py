"""The verifiers: what each compares, and the one form in which Python, YAML and every host name them.

A capture may reject by answer, as DeepSeek-R1's distillation did (arXiv 2501.12948, 2.3.3): the teacher generates
several completions a prompt and the student learns from those alone that reach the right answer. In the panel a
verifier decides whether a correction is accepted, or is a reward.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from typing import Any

from kd_plugin.errors import ConfigError, DataError, MissingDependencyError, nearest, require_known_keys
from kd_plugin.verifying.programs import Limits, extracted_program, read_checks, require_confinement, run_checks

NO_MATHEMATICS, NO_ANSWER, WRONG, FILTERED = "reference is no mathematics", "no answer", "wrong answer", "filtered"


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of a response.

    Attributes:
        passed: whether it is accepted.
        score: in [0, 1], the reward: of unit tests the share that passed, else 1 or 0.
        reason: why it is not accepted, in words that are counted; None where it is.
    """

    passed: bool
    score: float
    reason: str | None = None

    @classmethod
    def of(cls, passed: bool, reason: str) -> Verdict:
        """Return the verdict of a check that knows only yes and no."""
        return cls(passed, float(passed), None if passed else reason)


Answer = bool | str | float | Verdict | None
Check = Callable[[str, Mapping[str, Any]], Answer]


@dataclass(frozen=True)
class Verifier:
    """A check of responses, with the name under which manifests and records know it.

    Attributes:
        name: two captures share a directory only if it is equal.
        check: called with the response, without its reasoning, and the dataset's row. It returns a verdict; or True or
            None to accept; False to reject; text to reject with that reason; a score in [0, 1], accepted from
            ``threshold``.
        columns: columns of the row that it reads; None for any.
        reason: what is counted where it returns False.
        threshold: the least score that is accepted.
        waits: whether it spends its time waiting for another process, so that several threads go faster.
    """

    name: str
    check: Check
    columns: tuple[str, ...] | None
    reason: str = FILTERED
    threshold: float = 1.0
    waits: bool = False

    def verify(self, response: str, row: Mapping[str, Any], where: str = "the row") -> Verdict:
        """Say whether ``response`` is accepted for ``row``.

        Raises:
            DataError: the check itself failed, or returned something else; names ``where``.
        """
        try:
            answer = self.check(response, row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except Exception as error:
            raise DataError(
                f"The filter {self.name} failed at {where}: {type(error).__name__}: {error}. Nothing of its unit was "
                "stored. Let it return False for what it cannot decide."
            ) from error
        if isinstance(answer, Verdict):
            return answer
        if answer is None or answer is True:
            return Verdict(True, 1.0)
        if answer is False:
            return Verdict(False, 0.0, self.reason)
        if isinstance(answer, str) and answer:
            return Verdict(False, 0.0, answer)
        if isinstance(answer, int | float) and math.isfinite(answer) and 0 <= answer <= 1:
            passed = answer >= self.threshold
            return Verdict(passed, float(answer), None if passed else self.reason)
        raise DataError(
            f"The filter {self.name} returned {answer!r} at {where}; expected True to keep a completion, False or "
            "the reason as text to drop it, or a score from 0 to 1."
        )

    def why_not(self, response: str, row: Mapping[str, Any], where: str) -> str | None:
        """Return the reason for which ``response`` is rejected, or None to accept it; raises as :meth:`verify`."""
        verdict = self.verify(response, row, where)
        return None if verdict.passed else verdict.reason or self.reason


Given = str | Mapping[str, Any] | Sequence[Any] | Check | Verifier | None


def make_verifier(given: Given, answer_column: str = "answer") -> Verifier | None:
    """Return the verifier that ``given`` names.

    Args:
        given: a kind by its name (``exact``, ``contains``, ``math_verify``); the import path of a function,
            ``package.module:function``; a mapping with ``kind`` and that kind's settings (:data:`KINDS`); a list of
            these, all of which must accept; a callable that takes the response and the row; or None.
        answer_column: column of the reference, for kinds that compare with one and name no ``column``.

    Raises:
        ConfigError: no such kind, setting, module or function.
        MissingDependencyError: ``math_verify`` is not installed.
    """
    if given is None or isinstance(given, Verifier):
        return given
    if callable(given):
        name = f"{getattr(given, '__module__', '?')}:{getattr(given, '__qualname__', type(given).__name__)}"
        return Verifier(name, given, None)
    if isinstance(given, Mapping):
        return _from_mapping(given, answer_column)
    if not isinstance(given, str):
        return _all_of([make_verifier(one, answer_column) for one in given])
    if given in KINDS:
        return _from_mapping({"kind": given}, answer_column)
    if ":" in given:
        return _from_mapping({"kind": "function", "path": given}, answer_column)
    raise ConfigError(
        f"filter: {given!r} is unknown; expected one of {', '.join(KINDS)}, or the import path of a function, "
        f"`package.module:function`.{nearest(given, list(KINDS))}"
    )


def verifier(name: str) -> Callable[[str, str], bool]:
    """Return the function that compares a response with the right answer, for those that have no row.

    Args:
        name: ``exact``: the same text but for spaces around it. ``contains``: the answer occurs in the text. ``math``:
            the last mathematical expression means the same; needs math-verify.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: ``math`` without math-verify.
    """
    known = ("exact", "contains", "math")
    if name not in known:
        raise ConfigError(f"Unknown verify {name!r}; expected one of {', '.join(known)}." + nearest(name, list(known)))
    made = make_verifier(name)
    assert made is not None
    return lambda response, answer: made.verify(response, {"answer": answer}).passed


def reference(row: Mapping[str, Any], column: str) -> str:
    """Return the reference answer of a row as text.

    Raises:
        DataError: the row has none.
    """
    return str(_cell(row, column))


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise DataError(
            f"the column {column!r} with the reference answer is missing or empty; the row has {sorted(row)}. Name "
            "the right one with answer_column."
        )
    return row[column]


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
    # Bare LaTeX is marked as such: of 3\pi alone the number would be read. Words are no mathematics
    bare = not re.search(r"\$|\\boxed|\\\[|\\\(|(?<![\\{\w])[^\W\d_]{2,} ", answer)
    gold = parse(f"${answer}$", parsing_timeout=limit) if bare else []
    gold = gold or parse(answer, parsing_timeout=limit)
    if not gold:
        return NO_MATHEMATICS
    found = parse(response, parsing_timeout=limit)
    if not found:
        return NO_ANSWER
    return bool(verify(gold, found, timeout_seconds=limit))


@dataclass(frozen=True)
class Exact:
    """The response is the answer, but for white space around it."""

    column: str = field(default="answer", metadata={"help": "Column of the reference answer."})

    def __call__(self, response: str, row: Mapping[str, Any]) -> Answer:
        """Compare."""
        return same_text(response, reference(row, self.column))


@dataclass(frozen=True)
class Contains:
    """The answer occurs in the response."""

    column: str = field(default="answer", metadata={"help": "Column of the reference answer."})

    def __call__(self, response: str, row: Mapping[str, Any]) -> Answer:
        """Look for the answer."""
        return reference(row, self.column).strip() in response


@dataclass(frozen=True)
class Mathematics:
    """The last mathematical expression of the response, boxed or not, means what the answer means."""

    column: str = field(default="answer", metadata={"help": "Column of the reference answer."})

    def __post_init__(self) -> None:
        try:
            import_module("math_verify")
        except ImportError as error:
            raise MissingDependencyError(
                "math_verify needs the package math-verify. Install it: pip install 'kd-plugin[verify]'."
            ) from error

    def __call__(self, response: str, row: Mapping[str, Any]) -> Answer:
        """Compare as mathematics."""
        return same_mathematics(response, reference(row, self.column))


@dataclass(frozen=True)
class Regex:
    """The pattern occurs in the response; with a column, what its first group found last is the answer."""

    pattern: str = field(metadata={"help": "As Python's re has it."})
    column: str | None = field(default=None, metadata={"help": "Column that the first group must equal."})

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ConfigError(f"regex: {self.pattern!r} is no regular expression: {error}.") from error
        if self.column is not None and not groups:
            raise ConfigError(
                f"regex: {self.pattern!r} has no group to compare with column {self.column!r}; add (...)."
            )

    def __call__(self, response: str, row: Mapping[str, Any]) -> Answer:
        """Search, and compare the last match with the answer."""
        found = list(re.finditer(self.pattern, response))
        if not found or self.column is None:
            return bool(found) or NO_ANSWER
        return same_text(found[-1].group(1) or "", reference(row, self.column))


@dataclass(frozen=True)
class Function:
    """A Python function, by its import path, that takes the response and the row."""

    path: str = field(metadata={"help": "package.module:function"})
    threshold: float = field(default=1.0, metadata={"help": "The least score that is accepted, if it returns scores."})

    def __post_init__(self) -> None:
        module, _, function = self.path.partition(":")
        try:
            found = getattr(import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"filter: {self.path!r} cannot be imported ({error}). Is its directory in PYTHONPATH?"
            ) from error
        if not callable(found):
            raise ConfigError(f"filter: {self.path!r} is a {type(found).__name__}; expected a function.")

    def __call__(self, response: str, row: Mapping[str, Any]) -> Answer:
        """Call it."""
        module, _, function = self.path.partition(":")
        answer: Answer = getattr(import_module(module), function)(response, row)
        return answer


@dataclass(frozen=True)
class UnitTests:
    """The response's program passes the tests of its row, in a process without network, files or children."""

    column: str = field(default="tests", metadata={"help": "Column of the tests; see docs/text-teachers.md."})
    seconds: float = field(default=10.0, metadata={"help": "Time of a program, start included."})
    memory_mb: int = field(default=1024, metadata={"help": "Address space of a program."})
    threshold: float = field(default=1.0, metadata={"help": "Share of the tests that must pass."})

    def __post_init__(self) -> None:
        self.limits  # noqa: B018  -- refuses what is out of range
        require_confinement()

    @property
    def limits(self) -> Limits:
        """What a program may use."""
        return Limits(self.seconds, self.memory_mb)

    def __call__(self, response: str, row: Mapping[str, Any]) -> Answer:
        """Run the program in the response's last fenced block, or the response itself."""
        checks = read_checks(_cell(row, self.column), self.column)
        outcome = run_checks(extracted_program(response), checks, self.limits)
        share = outcome.passed / outcome.total
        passed = share >= self.threshold
        return Verdict(passed, share, None if passed else outcome.reason)


KINDS: dict[str, type[Any]] = {
    "exact": Exact,
    "contains": Contains,
    "math_verify": Mathematics,
    "regex": Regex,
    "function": Function,
    "tests": UnitTests,
    "exact_match": Exact,
    "math": Mathematics,
}
_COMPARED = (Exact, Contains, Mathematics)


def _from_mapping(given: Mapping[str, Any], answer_column: str) -> Verifier:
    values = dict(given)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(
            f"verifier: kind is {kind!r}; expected one of {', '.join(KINDS)}.{nearest(str(kind), list(KINDS))}"
        )
    cls = KINDS[kind]
    require_known_keys(values, [f.name for f in fields(cls)], f"verifier {kind}")
    for one in fields(cls):
        if one.default is MISSING and one.name not in values:
            raise ConfigError(f"verifier {kind} needs {one.name}: {one.metadata['help']}")
    if cls in _COMPARED:
        values.setdefault("column", answer_column)
    try:
        check = cls(**values)
    except TypeError as error:
        raise ConfigError(f"verifier {kind}: {error}.") from error
    if cls is Function:
        return Verifier(check.path, check, None, FILTERED, check.threshold)
    column = check.column
    others = ", ".join(f"{k}={v!r}" for k, v in values.items() if k != "column")
    name = f"{kind}({', '.join(part for part in (column, others) if part)})"
    return Verifier(name, check, () if column is None else (column,), WRONG, waits=cls is UnitTests)


def _all_of(given: Sequence[Verifier | None]) -> Verifier | None:
    """Return the verifier that accepts what all accept; its score is the product of theirs."""
    made = [one for one in given if one is not None]
    if len(made) < 2:
        return made[0] if made else None
    columns = [one.columns for one in made]

    def check(response: str, row: Mapping[str, Any]) -> Verdict:
        score = 1.0
        for one in made:
            verdict = one.verify(response, row)
            if not verdict.passed:
                return verdict
            score *= verdict.score
        return Verdict(True, score)

    return Verifier(
        " and ".join(one.name for one in made),
        check,
        None if None in columns else tuple(dict.fromkeys(c for some in columns for c in some or ())),
        waits=any(one.waits for one in made),
    )
