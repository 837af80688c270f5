"""All rows."""

from collections.abc import Iterable, Sequence

from tests.lineage_attacks import rows_data, rows_files, rows_names, rows_records, rows_voice  # noqa: F401
from tests.lineage_attacks.attack import ROWS

__all__ = ["ROWS", "lines"]


def lines(seen: Iterable[Sequence[str]]) -> list[str]:
    """Return the table of what was run, one line an attack: its point, what was given, what is right, what was seen."""
    found = sorted(seen)
    width = max((len(given) for _, given, _, _ in found), default=0)
    head = f"{'attacks':<12} {'given':<{width}} {'right':<26} seen"
    return [head, *(f"{point:<12} {given:<{width}} {right:<26} {said}" for point, given, right, said in found)]
