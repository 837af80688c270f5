"""Cut a release: give what is unreleased its version and date, and the package its version.

python -m tests.release.changelog 0.2.0     (`make release VERSION=0.2.0`)
"""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path

UNRELEASED = "## Unreleased\n"
VERSION_LINE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
HEADING = re.compile(r"^## (\d+\.\d+\.\d+)", re.MULTILINE)
FORM = re.compile(r"\d+\.\d+\.\d+")


def cut(tree: Path, version: str, date: str | None = None) -> str:
    """Cut ``version`` in a checkout; what is added from then on is unreleased again.

    Returns:
        The notes of the release.

    Raises:
        SystemExit: it cannot be cut, with the reason; then nothing is changed.
    """
    changelog, package = tree / "CHANGELOG.md", tree / "kd_plugin" / "__init__.py"
    text, code = changelog.read_text(encoding="utf-8"), package.read_text(encoding="utf-8")
    if not FORM.fullmatch(version):
        raise SystemExit(f"{version!r} is no version; expected three numbers, as in 0.2.0.")
    if text.count(UNRELEASED) != 1:
        raise SystemExit(f"{changelog} has {text.count(UNRELEASED)} headings 'Unreleased'; expected one.")
    head, rest = text.split(UNRELEASED)
    released = HEADING.search(rest)
    notes = rest[: released.start() if released else len(rest)].strip()
    if not notes:
        raise SystemExit(f"{changelog} has nothing under 'Unreleased', so there is nothing to release.")
    before = VERSION_LINE.findall(code)
    if len(before) != 1:
        raise SystemExit(f"{package} states its version {len(before)} times; expected once.")
    newest = max(before + HEADING.findall(rest), key=_order)
    if _order(version) <= _order(newest):
        raise SystemExit(f"{version} does not come after {newest}.")
    date = date or datetime.now(UTC).date().isoformat()
    changelog.write_text(f"{head}{UNRELEASED}\n## {version} ({date})\n{rest}", encoding="utf-8")
    package.write_text(VERSION_LINE.sub(f'__version__ = "{version}"', code), encoding="utf-8")
    return notes


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Name the version: make release VERSION=0.2.0")
    cut(Path.cwd(), sys.argv[1])
    print(f"Cut {sys.argv[1]}: commit CHANGELOG.md and kd_plugin/__init__.py, tag it v{sys.argv[1]}, and push the tag.")
