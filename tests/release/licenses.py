"""What each distribution in an environment says of its licence, and whether ours may depend on it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

# Permissive, and the weak copyleft of files that we do not change. A dependency under another licence needs a decision.
ACCEPTED = re.compile(
    r"apache|\bmit\b|bsd|isc|python software foundation|psf|mozilla public license|mpl-2|zlib|cc0|unlicense|historical",
    re.IGNORECASE,
)
_LONGEST = 80  # of what counts as a name and not as a text


@dataclass(frozen=True)
class Declared:
    """A distribution, and the licence that it names; empty where it names none.

    Attributes:
        name: as it writes it.
        version: installed.
        license: an SPDX expression, or what stands in its place.
    """

    name: str
    version: str
    license: str


def declared_in(site: Path) -> list[Declared]:
    """Return what the distributions in a ``site-packages`` declare, by name."""
    found = (
        Declared(one.metadata["Name"], one.version, " / ".join(dict.fromkeys(_named(one))))
        for one in distributions(path=[str(site)])
    )
    return sorted(found, key=lambda declared: declared.name.lower())


def unaccepted(declared: Iterable[Declared], direct: Iterable[str]) -> list[Declared]:
    """Return those of our own dependencies whose licence is not among those that we accept."""
    wanted = {canonical(name) for name in direct}
    return [one for one in declared if canonical(one.name) in wanted and not ACCEPTED.search(one.license)]


def as_table(declared: Iterable[Declared], direct: Iterable[str]) -> str:
    """Return a Markdown table; our own dependencies are in bold."""
    wanted = {canonical(name) for name in direct}
    lines = ["| distribution | version | licence |", "|---|---|---|"]
    for one in declared:
        name = f"**{one.name}**" if canonical(one.name) in wanted else one.name
        lines.append(f"| {name} | {one.version} | {one.license or 'not declared in its metadata'} |")
    return "\n".join(lines) + "\n"


def canonical(name: str) -> str:
    """Return a distribution's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _named(one: Distribution) -> Iterator[str]:
    """Yield the SPDX expression; without one the classifiers; without these the field's or the text's first line."""
    fields = one.metadata
    if fields.get("License-Expression"):
        yield fields["License-Expression"]
        return
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in fields.get_all("Classifier") or () if c.startswith("License ::")]
    named = [c for c in classifiers if c not in ("OSI Approved", "DFSG approved")]
    if named:
        yield from named
        return
    texts = [(fields.get("License") or "").replace("UNKNOWN", "")]
    for path in fields.get_all("License-File") or ():
        texts += [one.read_text(f"licenses/{path}") or "", one.read_text(path) or ""]
    lines = (line.strip() for text in texts for line in text.splitlines())
    yield from [line[:_LONGEST] for line in lines if line][:1]
