"""``kd-plugin lineage``: show and verify who taught a checkpoint, under which terms."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kd_plugin.errors import LineageError
from kd_plugin.lineage import NO_ADVICE, load_record, verify

_ABOUT = f"""Who taught a checkpoint, under which terms, and what whoever ships it owes.

  show DIR     the lineage as a tree, with decision, findings and duties
  verify DIR   recompute everything from the files alone, offline

{NO_ADVICE}"""
_SHOW = """Show the lineage of a checkpoint: what it was made from, the decision, and the duties of whoever ships it.

example:
  kd-plugin lineage show out/checkpoint-100
  kd-plugin lineage show out/checkpoint-100 --json | jq .effective.decision

exit codes: 0 shown, 2 lineage.json is damaged or was edited, 3 it is missing"""
_VERIFY = """Recompute the lineage of a checkpoint from its files alone: digests of the weights, licence texts, NOTICE,
the decision and every duty, and the chain to its parent. No network is used and no model is loaded.

example:
  kd-plugin lineage verify out/checkpoint-100

exit codes:
  0  good: the files are whole and nothing forbids shipping them
  1  violation: the files are whole, and the terms forbid something, or a duty is not met
  2  tampered: a weight file, a text or the record was changed, is missing or is extra
  3  incomplete: lineage.json is missing, so the checkpoint was not finished"""
EXIT_DAMAGED, EXIT_MISSING = 2, 3


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin lineage ARGV`` and return its exit code; ``--help`` lists the codes."""
    parser = argparse.ArgumentParser(
        "kd-plugin lineage", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description, run in (("show", _SHOW, _show), ("verify", _VERIFY, _verify)):
        command = commands.add_parser(
            name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("directory", metavar="DIR", type=Path, help="a checkpoint directory")
        command.add_argument("--json", action="store_true", help="print JSON for machines instead")
        command.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    result: int = arguments.run(arguments)
    return result


def _show(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage.tree import record_tree

    directory: Path = arguments.directory
    try:
        record = load_record(directory)
        if arguments.json:
            print(json.dumps(record, indent=2, ensure_ascii=False))
        else:
            _console().print(record_tree(record, directory.resolve().name))
    except LineageError as error:
        print(f"kd-plugin lineage show: {error}", file=sys.stderr)
        return EXIT_DAMAGED if (directory / "lineage.json").exists() else EXIT_MISSING
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.directory)
    decision = report.verdict.decision if report.verdict else None
    if arguments.json:
        problems = [{"kind": p.kind, "where": p.where, "message": p.message} for p in report.problems]
        outcome = {"exit_code": report.exit_code, "decision": decision, "problems": problems}
        print(json.dumps({**outcome, "notes": report.notes, "disclaimer": NO_ADVICE}, indent=2, ensure_ascii=False))
        return report.exit_code
    console = _console()
    word = ("good", "violation", "tampered", "incomplete")[report.exit_code]
    console.print(Text.assemble((word, "green" if word == "good" else "red"), f"  {arguments.directory}"))
    for problem in report.problems:
        console.print(Text(f"  {problem}"))
    for note in report.notes:
        console.print(Text(f"  note: {note}"))
    if decision is not None:
        console.print(Text(f"  decision: {decision.replace('_', ' ')}"))
    console.print(Text(NO_ADVICE, style="italic"))
    return report.exit_code


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
