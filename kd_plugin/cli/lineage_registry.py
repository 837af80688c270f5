"""``kd-plugin lineage registry``: what is known of each licence and of each provider's terms, and how old it is."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from kd_plugin.errors import nearest
from kd_plugin.lineage import NO_ADVICE
from kd_plugin.lineage.policy import decision_of
from kd_plugin.lineage.registry import UNKNOWN, Registry, default_registry, load_registry
from kd_plugin.lineage.sources import Clause, Terms
from kd_plugin.lineage.verdict import FACTS

_LIST = """List every licence and every provider's terms that the registry knows: what it says of a teacher (with no
fact declared), when its words were read and how many days ago, and whether its text is shipped.

example:
  kd-plugin lineage registry list
  kd-plugin lineage registry list --json | jq -r '.entries[] | select(.days > 180) | .id'

exit codes: 0 listed, 1 the registry that was given cannot be read"""
_SHOW = """Show one entry: where its words stand, who read them and when, and each clause with its reach.

example:
  kd-plugin lineage registry show lfm1.0

exit codes: 0 shown, 1 there is no such entry, or the registry that was given cannot be read"""
EXIT_NO_ENTRY = 1
_DATE = r"(\d{4})-(\d{2})(?:-(\d{2}))?\b"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add ``list`` and ``show ID`` below ``kd-plugin lineage registry``."""
    commands = parser.add_subparsers(dest="registry_command", required=True, metavar="COMMAND")
    for name, description, run in (("list", _LIST, _list), ("show", _SHOW, _show)):
        command = commands.add_parser(name, description=description)
        if name == "show":
            command.add_argument("id", metavar="ID", help="an entry's id, or another spelling of it")
        command.add_argument("--json", action="store_true", help="print JSON for machines instead")
        command.add_argument("--registry", type=Path, help="TOML of your own, laid on top of the package's")
        command.set_defaults(run=run)


def days_since(read: str, today: date) -> int | None:
    """Return how many days ago an entry was read, counted from the first of the month where no day is given.

    Args:
        read: what the entry says: ``"2026-11-24"``, ``"2026-11 quoted"``.
        today: the day to count to.

    Returns:
        The days, or None where no date stands there.
    """
    found = re.match(_DATE, read)
    try:
        return None if found is None else (today - date(*(int(part or 1) for part in found.groups()))).days
    except ValueError:
        return None


def _list(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    entries = [_summary(entry) for _, entry in sorted(registry.terms.items())]
    if arguments.json:
        _print_json({"version": registry.version, "sha256": registry.sha256, "entries": entries})
        return 0
    print(f"registry {registry.version}: {len(entries)} entries, {len(registry.known)} repositories\n")
    rows = [("id", "as a teacher", "read", "days ago", "words")]
    rows += [
        (
            e["id"],
            e["as_a_teacher"].replace("_", " "),
            _date(e["read"]),
            "?" if e["days"] is None else str(e["days"]),
            _words(e),
        )
        for e in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    print(f"\n{NO_ADVICE}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    entry = _find(registry, arguments.id)
    if entry is None:
        known = [*registry.terms, *registry.aliases]
        print(
            f"kd-plugin lineage registry show: no entry {arguments.id!r}: its terms count as unknown."
            f"{nearest(arguments.id.strip().lower(), known)} `kd-plugin lineage registry list` names them all; "
            "describe it in a registry of your own once you have read it.",
            file=sys.stderr,
        )
        return EXIT_NO_ENTRY
    names = {
        "aliases": _naming(registry.aliases, entry.id),
        "hosts": _naming(registry.hosts, entry.id),
        "repositories": sorted(one.repo for one in registry.known.values() if one.license == entry.id),
    }
    if arguments.json:
        _print_json({**_summary(entry), **names, "entry": entry.to_json(), "entry_sha256": entry.digest})
        return 0
    for line in _lines(entry, names):
        print(line)
    return 0


def _lines(entry: Terms, names: Mapping[str, list[str]]) -> list[str]:
    about = _summary(entry)
    texts = (
        [f"{entry.text} (sha256 {entry.text_sha256})"] if entry.text else ["not shipped: supply it where it is owed"]
    )
    rows = [
        ("as a teacher", about["as_a_teacher"].replace("_", " ") + ", with no fact declared"),
        ("read", f"{entry.read or 'no date'} ({_ago(about['days'])})"),
        ("read in", entry.source),
        ("words stand at", entry.url),
        ("text", "; ".join([*texts, *entry.attachments]) if entry.kind == "license" else ""),
        ("SPDX", entry.spdx or ""),
        ("a student is a derivative by", ", ".join(entry.inherits)),
        ("NOTICE must say", entry.notice_line or ""),
        *((word, ", ".join(found)) for word, found in names.items()),
    ]
    lines = [f"{entry.id}: {entry.name}", *(f"  {word}: {value}" for word, value in rows if value)]
    for clause in entry.clauses:
        lines += ["", *_clause_lines(clause)]
    return [*lines, "", NO_ADVICE]


def _clause_lines(clause: Clause) -> list[str]:
    reach = ", ".join([*clause.reach, *(f"{one} (as a precaution)" for one in clause.precaution)])
    lines = [f"  {clause.cite}  {clause.effect}: {clause.kind}", f"    {clause.says}"]
    lines.append(f"    binds on: {reach}; at: {clause.trigger}")
    if clause.fact:
        lines.append(f"    where `{clause.fact}` is true: {FACTS.get(clause.fact, 'a fact of your own')}")
    if clause.unless_student:
        lines.append(f"    not for a student made from: {', '.join(clause.unless_student)}")
    if clause.unless_repo:
        lines.append(f"    not for: {', '.join(clause.unless_repo)}")
    return lines


def _find(registry: Registry, written: str) -> Terms | None:
    direct = registry.terms.get(written.strip())
    if direct is not None:
        return direct
    found = registry.resolve(written, "user")
    whole = " " not in (found.expression or "")  # an expression names several
    return registry.terms[found.ids[0]] if whole and found.ids != (UNKNOWN,) else None


def _summary(entry: Terms) -> dict[str, Any]:
    return {
        "id": entry.id,
        "kind": entry.kind,
        "name": entry.name,
        "as_a_teacher": decision_of(entry),
        "read": entry.read,
        "days": days_since(entry.read, _today()),
        "quoted": "quoted" in entry.read,
        "text": entry.text,
    }


def _words(about: Mapping[str, Any]) -> str:
    if about["quoted"]:
        return "quoted by others" if about["read"] == f"{_date(about['read'])} quoted" else "quoted in part"
    return "text shipped" if about["text"] else "not shipped"


def _date(read: str) -> str:
    found = re.match(_DATE, read)
    return "?" if found is None else found.group()


def _ago(days: int | None) -> str:
    return "how long ago is not known" if days is None else f"{days} day{'' if days == 1 else 's'} ago"


def _naming(spellings: Mapping[str, str], terms_id: str) -> list[str]:
    return sorted(s for s, target in spellings.items() if target == terms_id and s != terms_id)


def _registry(arguments: argparse.Namespace) -> Registry:
    return default_registry() if arguments.registry is None else load_registry(arguments.registry)


def _today() -> date:
    return date.today()


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps({**value, "disclaimer": NO_ADVICE}, indent=2, ensure_ascii=False))
