"""Run every attack and print the table; 1 if a verdict is not the right one."""

import sys
import tempfile
from pathlib import Path

from tests.lineage_attacks.table import ROWS, lines

seen = {}
for row in ROWS:
    with tempfile.TemporaryDirectory() as place:
        seen[row] = row.see(Path(place))
print("\n".join(lines((row.point, row.given, row.expect, said) for row, said in seen.items())))
wrong = [row for row, said in seen.items() if said != row.expect]
print(f"{len(seen)} attacks, {len(wrong)} with another verdict than the right one")
sys.exit(bool(wrong))
