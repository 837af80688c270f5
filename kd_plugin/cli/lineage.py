"""``kd-plugin lineage``: who taught a checkpoint, under which terms, and what whoever ships it owes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kd_plugin.cli.lineage_registry import add_commands as add_registry_commands
from kd_plugin.cli.parsing import Parser
from kd_plugin.errors import ConfigError, LineageError
from kd_plugin.lineage import NO_ADVICE, Problem, load_record, verify

_ABOUT = f"""Who taught a checkpoint, under which terms, and what whoever ships it owes.

before a run:
  check CONFIG   the verdict from declarations and what is on disk, before anything runs
  registry       what is known of each licence and provider's terms, and how old it is: list, or show ID

on a checkpoint:
  show DIR       the lineage as a tree, with decision, findings and duties
  verify DIR     recompute everything from the files alone, offline
  diff A B       what changed between two checkpoints
  export DIR     CycloneDX 1.7 or 1.6, SPDX 3.0.1, or Markdown
  graph DIR      the lineage as a picture: SVG, HTML or Mermaid
  sign DIR       sign it with a local key; verify DIR --key checks that

exit codes: each command's help lists its own

{NO_ADVICE}"""
_REGISTRY = """Print what the registry knows of licences and of providers' terms, and how old each reading is.

  list       every entry, one a line
  show ID    one entry with its clauses; exit code 1 where there is none

exit codes: 0 printed, 1 there is no such entry, or the registry that was given cannot be read"""
_CHECK = """Print the verdict that a run with these declarations would get. Loads no model, needs no network.

example (lineage.yaml):
  student: {repo: Qwen/Qwen2.5-7B, license: apache-2.0, name: acme-small}
  teachers:
    r1:  {repo: deepseek-ai/DeepSeek-R1, license: mit, signal: text}
  datasets:
    - {repo: someone/instructions, license: cc-by-4.0, generated_by: []}
  use: {commercial: true, distribute: true, eu_domiciled: false, mau_over_700m_at_release: false}

  kd-plugin lineage check lineage.yaml

exit codes:
  0  allowed, with or without duties
  1  refused: terms forbid it, are not known, or a duty is violated
  2  the declarations cannot be read
  3  facts are missing that the terms turn on"""
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
  1  violation: the files are whole, and the terms forbid something, or a duty is not met; or the key or the registry
     that was given cannot be read
  2  tampered: a weight file, a text or the record was changed, is missing or is extra
  3  incomplete: lineage.json is missing, so the checkpoint was not finished; or weights of such a one lie below"""
_DIFF = """List what changed from checkpoint A to checkpoint B: sources, duties, findings, facts, decision.

exit codes: 0 nothing, 1 something, 2 a record is damaged, 3 it is missing"""
_EXPORT = """Print the lineage in a format that other tools read, or write it to --output.

example:
  kd-plugin lineage export out/checkpoint-100 --format spdx --output sbom.spdx.json

exit codes: 0 done, 1 the output cannot be written, 2 the record is damaged, 3 it is missing"""
_GRAPH = """Draw the lineage: as one self-contained SVG, as an HTML page with the terms at each node, or as Mermaid text
for a README. No script, nothing fetched.

example:
  kd-plugin lineage graph out/checkpoint-100 --output lineage.svg
  kd-plugin lineage graph out/checkpoint-100 --output lineage.html

exit codes: 0 done, 1 the output cannot be written, 2 the record is damaged, 3 it is missing"""
_SIGN = """Sign every file of a checkpoint with a local elliptic-curve key, into lineage.sig.

example:
  openssl ecparam -name prime256v1 -genkey -noout -out private.pem
  openssl ec -in private.pem -pubout -out public.pem
  kd-plugin lineage sign out/checkpoint-100 --key private.pem
  kd-plugin lineage verify out/checkpoint-100 --key public.pem

exit codes: 0 signed, 1 no key or no model-signing, 2 the checkpoint is tampered, 3 it is incomplete"""
EXIT_DAMAGED, EXIT_MISSING = 2, 3
_Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin lineage ARGV`` and return its exit code; ``--help`` lists the codes."""
    parser = Parser("kd-plugin lineage", description=_ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, description: str, run: _Run, *places: str) -> Parser:
        command = commands.add_parser(name, description=description)
        for place in places:
            meaning = "a YAML file of declarations" if place == "CONFIG" else "a checkpoint directory"
            command.add_argument(place.lower(), metavar=place, type=Path, help=meaning)
        command.set_defaults(run=run)
        return command

    for name, description, run, place in (
        ("check", _CHECK, _check, "CONFIG"),
        ("show", _SHOW, _show, "DIR"),
        ("verify", _VERIFY, _verify, "DIR"),
    ):
        command = add(name, description, run, place)
        command.add_argument("--json", action="store_true", help="print JSON for machines instead")
        if name == "verify":
            command.add_argument("--key", type=Path, help="PEM file of the public key that lineage.sig must hold for")
            command.add_argument("--registry", type=Path, help="TOML of your own that the run was checked by")
    add("sign", _SIGN, _sign, "DIR").add_argument("--key", type=Path, required=True, help="PEM file of a private key")
    add("diff", _DIFF, _diff, "A", "B")
    export = add("export", _EXPORT, _export, "DIR")
    export.add_argument("--format", choices=("cyclonedx", "cyclonedx-1.6", "spdx", "markdown"), required=True)
    graph = add("graph", _GRAPH, _graph, "DIR")
    graph.add_argument("--format", choices=("svg", "html", "mermaid"), help="of the picture; else by --output's name")
    for command in (export, graph):
        command.add_argument("-o", "--output", type=Path, help="file to write; without it, standard output")
    registry = commands.add_parser("registry", description=_REGISTRY)
    add_registry_commands(registry)
    arguments = parser.parse_args(argv)
    run_command: _Run = arguments.run
    try:
        return run_command(arguments)
    except LineageError as error:
        print(f"kd-plugin lineage {arguments.command}: {error}", file=sys.stderr)
        places = [getattr(arguments, name) for name in ("dir", "a", "b") if hasattr(arguments, name)]
        return EXIT_DAMAGED if all((place / "lineage.json").exists() for place in places) else EXIT_MISSING


def _check(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage import RunLineage, Source

    try:
        run = RunLineage(method="check", student=Source("student"), config=arguments.config)
    except (ConfigError, LineageError) as error:
        print(f"kd-plugin lineage check: {error}", file=sys.stderr)
        return EXIT_DAMAGED
    verdict = run.verdict
    refused = bool(verdict.publication_stops)
    code = 1 if refused else 3 if verdict.decision == "conditional" else 0
    if arguments.json:
        _print_json({"exit_code": code, **verdict.to_json(), "disclaimer": NO_ADVICE})
        return code
    from kd_plugin.lineage.show import verdict_lines

    _console().print(verdict_lines(verdict.to_json(), run.graph))
    return code


def _show(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage.show import record_tree

    record = load_record(arguments.dir)
    if arguments.json:
        _print_json(record)
    else:
        _console().print(record_tree(record, arguments.dir.resolve().name))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage.registry import load_registry

    report = verify(arguments.dir, None if arguments.registry is None else load_registry(arguments.registry))
    if arguments.key is not None and report.exit_code != EXIT_MISSING:
        from kd_plugin.lineage.record import SIGNATURE
        from kd_plugin.lineage.signing import signature_problem

        reason = signature_problem(arguments.dir, arguments.key)
        if reason is not None:
            report = replace(report, problems=(*report.problems, Problem("tampered", SIGNATURE, reason)))
    decision = report.verdict.decision if report.verdict else None
    if arguments.json:
        problems = [{"kind": p.kind, "where": p.where, "message": p.message} for p in report.problems]
        outcome = {"exit_code": report.exit_code, "decision": decision, "problems": problems}
        _print_json({**outcome, "notes": report.notes, "disclaimer": NO_ADVICE})
        return report.exit_code
    console = _console()
    word = ("good", "violation", "tampered", "incomplete")[report.exit_code]
    console.print(Text.assemble((word, "green" if word == "good" else "red"), f"  {arguments.dir}"))
    for problem in report.problems:
        console.print(Text(f"  {problem}"))
    for note in report.notes:
        console.print(Text(f"  note: {note}"))
    if decision is not None:
        console.print(Text(f"  decision: {decision.replace('_', ' ')}"))
    console.print(Text(NO_ADVICE, style="italic"))
    return report.exit_code


def _sign(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage.signing import sign

    print(f"signed: {sign(arguments.dir, arguments.key)}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage.show import differences

    lines = differences(load_record(arguments.a), load_record(arguments.b))
    for line in lines:
        print(line)
    return 1 if lines else 0


def _export(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage import card, shipping

    record = load_record(arguments.dir)
    if arguments.format == "markdown":
        return _deliver(card.section(record) + "\n", arguments.output)
    name, _, version = arguments.format.partition("-")
    document = shipping.spdx(record) if name == "spdx" else shipping.cyclonedx(record, version or shipping.CYCLONEDX[0])
    return _deliver(json.dumps(document, indent=2, ensure_ascii=False) + "\n", arguments.output)


def _graph(arguments: argparse.Namespace) -> int:
    from kd_plugin.lineage import picture

    draws = {"svg": picture.graph_svg, "html": picture.graph_html, "mermaid": picture.graph_mermaid}
    suffix = {".html": "html", ".mmd": "mermaid"}.get(arguments.output.suffix if arguments.output else "", "svg")
    drawn = draws[arguments.format or suffix](load_record(arguments.dir), arguments.dir.resolve().name)
    return _deliver(drawn, arguments.output)


def _deliver(text: str, output: Path | None) -> int:
    from kd_plugin.lineage.record import write_file

    if output is None:
        sys.stdout.write(text)
        return 0
    try:
        if output.exists() and not output.is_file():  # a terminal or a pipe is written to, not replaced
            output.write_text(text)
        else:
            write_file(output, text.encode())
    except (LineageError, OSError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise ConfigError(f"--output {str(output)!r} cannot be written: {reason}.") from error
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
