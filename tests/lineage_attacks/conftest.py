"""The table of what was seen, printed after the tests."""

from tests.lineage_attacks.table import lines


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    seen = [value for report in reports for name, value in report.user_properties if name == "attack"]
    if seen:
        terminalreporter.section("lineage attacks")
        terminalreporter.write_line("\n".join(lines(seen)))
