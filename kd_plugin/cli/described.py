"""Help and shell completion without the imports of the commands: from ``described.json``, which lists their options.

``python -m kd_plugin.cli.described`` writes it anew from the commands themselves; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugin.cli.main import COMMANDS
from kd_plugin.cli.parsing import Parser, parser_of, written_for
from kd_plugin.upstream import option_groups, subcommands

FILE = Path(__file__).with_name("described.json")
_APART = {
    "cache": ("fidelity", "append", "import")
}  # sub-commands whose options are settings, and that parse by themselves
_COMPLETION = """\
Print what makes your shell complete commands and options. Put one of these lines into the file of your shell:

  eval "$(kd-plugin completion bash)"          # ~/.bashrc
  eval "$(kd-plugin completion zsh)"           # ~/.zshrc, after compinit
  kd-plugin completion fish | source           # ~/.config/fish/config.fish

Exit codes: 0 printed, 2 wrong usage.
"""


def completion(argv: Sequence[str]) -> int:
    """Run ``kd-plugin completion ARGV`` and return its exit code."""
    parser = Parser("kd-plugin completion", description=_COMPLETION)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="your shell")
    shell = parser.parse_args(list(argv)).shell
    import argcomplete

    print(argcomplete.shellcode(["kd-plugin"], shell=shell))
    return 0


def complete() -> None:
    """Answer the shell, which asks by the environment that argcomplete sets, and leave."""
    import argcomplete

    root = argparse.ArgumentParser("kd-plugin")
    commands = root.add_subparsers()
    for name, described in json.loads(FILE.read_text(encoding="utf-8")).items():
        _add(commands, name, described)
    argcomplete.autocomplete(root)


def help_of(name: str, words: Sequence[str]) -> str:
    """Return what ``kd-plugin NAME WORDS --help`` prints.

    Args:
        name: of the command.
        words: what follows; sub-commands are looked for until an option comes.
    """
    everything = json.loads(FILE.read_text(encoding="utf-8"))
    if name not in everything or (name == "capture" and written_for("targets", words) == "text"):
        # not this package's own, or `capture --targets text`, whose settings are others
        return parser_of(COMMANDS[name].run, [word for word in words if word not in ("-h", "--help")]).format_help()
    described = everything[name]
    for word in words:
        if word not in described["commands"]:
            break
        described = described["commands"][word]
    return _filled(Parser(described["prog"], add_help=False), described).format_help()


def described() -> dict[str, Any]:
    """Return the options of all commands, from the parsers that the commands build."""
    found = {}
    for name, command in COMMANDS.items():
        found[name] = _described(parser_of(command.run))
        for apart in _APART.get(name, ()):
            found[name]["commands"][apart] = _described(parser_of(command.run, [apart]))
    return found


def _described(parser: argparse.ArgumentParser) -> dict[str, Any]:
    groups = []
    for title, options in option_groups(parser):
        shown = [_option(one) for one in options if one.help != argparse.SUPPRESS]
        if shown:
            groups.append({"title": title, "options": shown})
    return {
        "prog": parser.prog,
        "usage": parser.usage,
        "description": parser.description,
        "groups": groups,
        "commands": {name: _described(one) for name, one in subcommands(parser).items()},
    }


def _option(one: argparse.Action) -> dict[str, Any]:
    choices = None if one.choices is None or isinstance(one.choices, dict) else list(one.choices)
    kept = {
        "flags": list({flag.replace("-", "_"): flag for flag in reversed(one.option_strings)}.values())[::-1],
        "dest": one.dest,
        "metavar": one.metavar if not isinstance(one.choices, dict) else "COMMAND",
        "nargs": one.nargs if not isinstance(one.choices, dict) else "...",
        "choices": choices,
        "help": one.help,
        "required": one.required or None,
    }
    return {key: value for key, value in kept.items() if value not in (None, [])}


def _filled(parser: argparse.ArgumentParser, described: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Give a parser the options that are described."""
    parser.usage, parser.description = described["usage"], described["description"]
    for group in described["groups"]:
        into = parser.add_argument_group(group["title"])
        for option in group["options"]:
            if option.get("nargs") == "..." and described["commands"]:
                continue  # the sub-commands, which are added below
            kept = {key: option[key] for key in ("metavar", "choices", "help") if key in option}
            flags = option.get("flags")
            if flags and option.get("nargs") == 0:
                into.add_argument(*flags, action="store_true", help=option.get("help"))
            elif flags:
                into.add_argument(*flags, nargs=option.get("nargs"), required=option.get("required", False), **kept)
            else:
                into.add_argument(option["dest"], nargs=option.get("nargs"), **kept)
    if described["commands"]:
        commands = parser.add_subparsers(metavar="COMMAND", title="commands")
        for name, one in described["commands"].items():
            _add(commands, name, one)
    return parser


def _add(commands: Any, name: str, described: Mapping[str, Any]) -> None:
    said = " ".join((described["description"] or "").split("\n\n")[0].split())
    _filled(commands.add_parser(name, prog=described["prog"], add_help=False, help=said.replace("%", "%%")), described)


if __name__ == "__main__":
    FILE.write_text(json.dumps(described(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {FILE}", file=sys.stderr)
