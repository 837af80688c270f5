import pytest

from tests.lineage_attacks.table import ROWS

SEEN = {}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.point}: {row.given}")
def test_attack(row, tmp_path):
    SEEN[row] = row.see(tmp_path)
    assert SEEN[row] == row.expect


def test_every_row_is_told_apart():
    assert len({(row.point, row.given) for row in ROWS}) == len(ROWS)
