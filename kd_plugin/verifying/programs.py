"""Running an answer that is a program, against tests, in a process that can do no harm.

The program may be hostile: a model under optimisation writes whatever passes. Its process (confined.py) has limits of
time, memory and output, and a seccomp filter that allows the few system calls of a computation: no sockets, no
children, no writing of files, no signals to others. What it could read, it cannot send anywhere: only counts and fixed
words come back. Tests by input and output are compared in this process. Tests by statements run in the program's own
process, as they must to call its functions: a program that looks for them there can find them.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.verifying.confined import CANNOT_CONFINE, OUT_OF_MEMORY, SYSTEM_CALLS

_SCRIPT = Path(__file__).with_name("confined.py")
_OUTPUT_BYTES = 1 << 20  # of a program; a write beyond fails
_FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:^|\n)[ \t]*```", re.DOTALL | re.IGNORECASE)
FAILED = "wrong answer"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall clock, its interpreter's start included; of processor time as well.
        memory_mb: of address space, the interpreter's own (some 30 MB, more with numpy) included.

    Raises:
        ConfigError: a number out of range.
    """

    seconds: float = 10.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds}: expected a number above 0.")
        if self.memory_mb < 64:
            raise ConfigError(f"memory_mb={self.memory_mb}: expected at least 64; the interpreter alone takes 30.")


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
        ended: by itself (``done``), by an error of its own (``crashed``), or by a limit.
        output: what it printed, at most 1 MiB.
    """

    ended: Literal["done", "crashed", "timeout", "memory"]
    output: str


@dataclass(frozen=True)
class Checks:
    """The tests of a row: statements that run after the program, or inputs with the outputs that they must give."""

    statements: tuple[str, ...] = ()
    cases: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.statements) + len(self.cases)


@dataclass(frozen=True)
class PassedChecks:
    """How many tests passed, of how many, and in a fixed word why not all."""

    passed: int
    total: int
    reason: str | None


def require_confinement() -> None:
    """Refuse a machine on which programs cannot be confined.

    Raises:
        ConfigError: no Linux, or a processor whose system calls are not listed.
    """
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        raise ConfigError(
            f"Unit tests run programs of a model, and they cannot be confined on {sys.platform} "
            f"{platform.machine()}: expected Linux on {' or '.join(SYSTEM_CALLS)}. Verify there, or by another kind."
        )


def extracted_program(response: str) -> str:
    """Return the last fenced block of Python in a response, or all of it where there is none."""
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


def read_checks(value: Any, column: str) -> Checks:
    """Read a row's tests, in the forms that public datasets have.

    Args:
        value: Python statements, as text or a list of texts, each a test (HumanEval, MBPP); or inputs and outputs, as
            ``{"inputs": [...], "outputs": [...]}`` (APPS, TACO) or a list of ``{"input": ..., "output": ...}``; or
            any of these as JSON text.
        column: where it stands, for the message.

    Raises:
        DataError: none of these, or no test.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # a Python statement may begin so too
            value = json.loads(value)
    found = Checks()
    if isinstance(value, str):
        found = Checks(statements=(value,) if value.strip() else ())
    elif isinstance(value, Mapping) and isinstance(value.get("inputs"), Sequence) and not value.get("fn_name"):
        outputs = value.get("outputs")
        if isinstance(outputs, Sequence) and len(outputs) == len(value["inputs"]):
            found = Checks(cases=tuple(zip(map(_text, value["inputs"]), map(_text, outputs), strict=True)))
    elif isinstance(value, Sequence) and all(isinstance(one, str) for one in value):
        found = Checks(statements=tuple(value))
    elif isinstance(value, Sequence) and all(
        isinstance(one, Mapping) and {"input", "output"} <= {*one} for one in value
    ):
        found = Checks(cases=tuple((_text(one["input"]), _text(one.get("output", ""))) for one in value))
    if not len(found):
        raise DataError(
            f"the column {column!r} holds no tests: {str(value)[:80]!r}. Expected statements, or "
            "{inputs: [...], outputs: [...]} of whole programs."
        )
    return found


def run_checks(program: str, checks: Checks, limits: Limits | None = None) -> PassedChecks:
    """Run a program against its tests, and stop at the first case that a limit ends.

    Args:
        program: Python source.
        checks: statements run in one process, one after the other; each case has a process of its own.
        limits: of each process.

    Raises:
        ConfigError: the process cannot be confined here.
    """
    limits = limits or Limits()
    passed, reason = 0, None
    if checks.statements:
        passed, reason = _statements(program, checks.statements, limits)
    for given, wanted in checks.cases:
        ran = run_program(program, given, limits)
        if ran.ended == "done" and _same_output(ran.output, wanted):
            passed += 1
            continue
        reason = reason or (FAILED if ran.ended == "done" else ran.ended)
        if ran.ended in ("timeout", "memory"):
            break
    return PassedChecks(passed, len(checks), None if passed == len(checks) else reason or FAILED)


def run_program(program: str, given: str = "", limits: Limits | None = None) -> Ran:
    """Run a whole program once, confined.

    Args:
        program: Python source.
        given: its standard input.
        limits: what it may use.

    Raises:
        ConfigError: the process cannot be confined here.
    """
    with tempfile.TemporaryFile() as output:
        ended = _confined({"program": program}, given, output, limits or Limits())
        return Ran(ended, _read(output))


def _statements(program: str, statements: Sequence[str], limits: Limits) -> tuple[int, str | None]:
    # A program that ends its process, prints, or writes where results go does not know this word
    word = secrets.token_hex(16)
    job = {"program": program, "statements": list(statements), "word": word}
    with tempfile.TemporaryFile() as output:
        ended = _confined(job, "", output, limits)
        said = _read(output)
    if said.startswith(word) and ended == "done":
        marks = said[len(word) :]
        if len(marks) == len(statements) and set(marks) <= {"+", "-"}:
            return marks.count("+"), None if "-" not in marks else FAILED
    return 0, "crashed" if ended == "done" else ended


def _confined(
    job: Mapping[str, Any], given: str, output: IO[bytes], limits: Limits
) -> Literal["done", "crashed", "timeout", "memory"]:
    require_confinement()
    with tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as stdin:
        bounds = {"seconds": math.ceil(limits.seconds) + 1, "memory": limits.memory_mb << 20, "output": _OUTPUT_BYTES}
        task.write(json.dumps({**job, **bounds}).encode("utf-8", "replace"))
        stdin.write(given.encode("utf-8", "replace"))
        task.seek(0)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(_SCRIPT), str(task.fileno())],
            stdin=stdin,
            stdout=output,
            stderr=subprocess.DEVNULL,
            pass_fds=(task.fileno(),),
            env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"},
            cwd="/",
            start_new_session=True,
        )
        try:
            code = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            process.kill()
            process.wait()
    if code == CANNOT_CONFINE:
        raise ConfigError(
            "Unit tests run programs of a model, and this kernel does not let their process be confined (seccomp). "
            "Run where it does, or verify by another kind."
        )
    if code == OUT_OF_MEMORY:
        return "memory"
    if code in (-signal.SIGKILL, -signal.SIGXCPU):  # the limit of processor time
        return "timeout"
    return "done" if code == 0 else "crashed"


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read(_OUTPUT_BYTES).decode("utf-8", "replace")


def _same_output(found: str, wanted: str) -> bool:
    """Compare line by line, without white space at the ends of lines and of the whole."""
    return [line.rstrip() for line in found.strip().splitlines()] == [
        line.rstrip() for line in wanted.strip().splitlines()
    ]


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "\n".join(map(str, value))
    return str(value)
