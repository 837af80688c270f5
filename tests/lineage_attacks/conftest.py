"""The table of what was seen, printed after the tests."""

from tests.lineage_attacks.table import lines
from tests.lineage_attacks.test_table import SEEN


def pytest_terminal_summary(terminalreporter):
    if SEEN:
        terminalreporter.section("lineage attacks")
        terminalreporter.write_line("\n".join(lines(SEEN)))
