import pytest

from tests.lineage_attacks.table import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.point}: {row.given}")
def test_attack(row, tmp_path, record_property):
    seen = row.see(tmp_path)
    record_property("attack", (row.point, row.given, row.expect, seen))  # for the table, also from another process
    assert seen == row.expect


def test_every_row_is_told_apart():
    assert len({(row.point, row.given) for row in ROWS}) == len(ROWS)
