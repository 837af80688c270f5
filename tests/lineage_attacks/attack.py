"""A row of the table, and short ways to ask for a verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, LicenseRefusedError, LineageError
from kd_plugin.lineage import RunLineage, Source, outputs_record, verify
from tests.core.lineage_help import RUN, model_dir

ROWS: list["Attack"] = []


@dataclass(frozen=True)
class Attack:
    """What is tried in an empty directory, and the verdict that is right.

    Attributes:
        point: letter and what it attacks: ``"A voice"``.
        given: what is tried, in words.
        expect: ``allow``, ``note CODE`` (allowed, and said), ``conditional``, ``unknown``, ``block``, ``overridden``;
            ``error`` where a declaration or a record is refused; of verify: ``good``, ``violation``, ``tampered``,
            ``incomplete``.
        see: does it and returns what was seen.
    """

    point: str
    given: str
    expect: str
    see: Callable[[Path], str]


def attack(point: str, given: str, expect: str, see: Callable[[Path], str]) -> None:
    """Add a row to the table."""
    ROWS.append(Attack(point, given, expect, see))


def verdict(run: Callable[[], Any], *notes: str) -> str:
    """Return the decision of a run, or ``note CODE`` where it passes with one of ``notes``."""
    try:
        found = run().verdict
    except (ConfigError, LineageError):
        return "error"
    said = [code for code in notes if code in {f.code for f in found.findings}]
    if said and found.decision.startswith("allow"):
        return f"note {said[0]}"
    return "allow" if found.decision.startswith("allow") else found.decision


def gate(
    place: Path,
    *notes: str,
    student: Source | None = None,
    teacher: Source | None = None,
    data: Source | None = None,
    config: dict[str, Any] | None = None,
) -> str:
    """Ask the gate about a run on an Apache student."""
    base = place / "gate-student"
    reference = str(base) if base.is_dir() else model_dir(place, base.name, "apache-2.0")
    return verdict(
        lambda: RunLineage(
            method="x",
            student=student or Source("student", ref=reference),
            teachers=[teacher] if teacher is not None else [],
            datasets=[data] if data is not None else [],
            config={"run": RUN, **(config or {})},
        ),
        *notes,
    )


def capture_gate(teacher: Source, *data: Source, config: dict[str, Any] | None = None) -> str:
    """Ask the gate of a capture."""
    try:
        outputs_record(teacher, data, config)
    except LicenseRefusedError as refused:
        return "block" if "Unknown licence" not in str(refused) else "unknown"
    return "allow"


def checked(checkpoint: Path) -> str:
    """Verify a checkpoint."""
    return {0: "good", 1: "violation", 2: "tampered", 3: "incomplete"}[verify(checkpoint).exit_code]
