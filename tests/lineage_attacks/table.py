"""All rows."""

from tests.lineage_attacks import rows_data, rows_files, rows_names, rows_records, rows_voice  # noqa: F401
from tests.lineage_attacks.attack import ROWS, Attack

__all__ = ["ROWS", "lines"]


def lines(seen: dict[Attack, str]) -> list[str]:
    """Return the table of what was run, one line an attack."""
    width = max((len(row.given) for row in seen), default=0)
    head = f"{'attacks':<12} {'given':<{width}} {'right':<26} seen"
    return [head, *(f"{r.point:<12} {r.given:<{width}} {r.expect:<26} {said}" for r, said in seen.items())]
