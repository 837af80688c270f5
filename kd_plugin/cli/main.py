"""The ``kd-plugin`` command: finds the sub-command, reads its settings, and turns errors into one clear line.

Settings of a command are a dataclass, filled from defaults, a YAML file and the command line, in this order.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

import yaml

from kd_plugin.errors import ConfigError, KDError, nearest, require_known_keys
from kd_plugin.inputs import read_yaml

Settings = TypeVar("Settings")
# Optional packages that commands import, and the extra that brings each
EXTRAS = {
    "trl": "trl",
    "peft": "trl",
    "accelerate": "trl",
    "gguf": "trl",
    "matplotlib": "plots",
    "deepspeed": "deepspeed",
}
EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Parsed(Generic[Settings]):
    """What a command line said.

    Attributes:
        settings: the filled dataclass.
        flags: the flags that were given.
        print_only: the user asked to see the settings, not to run; see :func:`as_yaml`.
    """

    settings: Settings
    flags: frozenset[str]
    print_only: bool


def parse_settings(
    cls: type[Settings],
    argv: Sequence[str],
    *,
    command: str,
    description: str,
    defaults: Settings | None = None,
    flags: Mapping[str, str] | None = None,
) -> Parsed[Settings]:
    """Parse ``argv`` into the dataclass ``cls``.

    ``--config FILE`` takes YAML whose keys are the fields; every field is also an option, and wins over the
    file. ``--config`` with no file after it, or ``--print_config``, asks for the settings as YAML.

    Args:
        cls: a dataclass; its docstring's ``Attributes`` become the help of the options.
        argv: the arguments after the command's name.
        command: the words after ``kd-plugin``.
        description: what ``--help`` says first.
        defaults: an instance whose values stand in for the fields' own defaults.
        flags: options without a value that are no settings, with their help, such as ``{"fresh": ...}``.

    Raises:
        ConfigError: an unknown option or YAML key (naming the nearest), a value of the wrong type, or a file
            that is missing or no YAML.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog=f"kd-plugin {command}", description=description, exit_on_error=False, print_config=None
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="A YAML file with these settings; without a file: print them as YAML.",
    )
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(cls)
    if defaults is not None:
        parser.set_defaults(dataclasses.asdict(defaults))  # type: ignore[call-overload]

    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments, print_only = _without_bare_config(argv)
    _require_known_options(arguments, [*names, "config", "help", *(flags or {})])
    for path in config_files(arguments):
        require_known_keys(read_yaml(path), names, path)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return Parsed(
        settings=cls(**{name: parsed[name] for name in names}),
        flags=frozenset(name for name in flags or {} if parsed[name]),
        print_only=print_only,
    )


def as_yaml(settings: Any) -> str:
    """Write settings as YAML, each under the sentence that explains it."""
    from docstring_parser import parse

    help_of = {p.arg_name: p.description or "" for p in parse(type(settings).__doc__ or "").params}
    lines = []
    for field in dataclasses.fields(settings):
        comment = " ".join(help_of.get(field.name, "").split())
        lines += textwrap.wrap(comment, 116, initial_indent="# ", subsequent_indent="# ")
        lines.append(yaml.safe_dump({field.name: getattr(settings, field.name)}, width=1000).rstrip())
    return "\n".join(lines)


def _without_bare_config(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take out ``--print_config``, and ``--config`` where no file follows."""
    kept, print_only = [], False
    for i, argument in enumerate(argv):
        bare = argument == "--config" and (i + 1 == len(argv) or argv[i + 1].startswith("--"))
        if bare or argument == "--print_config":
            print_only = True
        else:
            kept.append(argument)
    return kept, print_only


def _require_known_options(arguments: Sequence[str], known: list[str]) -> None:
    for argument in arguments:
        option = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and option not in known:
            raise ConfigError(f"unknown option --{option}.{nearest(option, known)} Known: {', '.join(known)}.")


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the files that ``--config`` names."""
    after = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == "--config"]
    return after + [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        target: ``module:function``, imported only when the command is called; the function takes the arguments after
            the command's name and returns the exit code.
        summary: what it does.
    """

    target: str
    summary: str

    def run(self, argv: Sequence[str]) -> int:
        """Import the function and call it."""
        module, _, function = self.target.partition(":")
        return int(getattr(import_module(module), function)(argv))


COMMANDS = {
    "demo": Command("kd_plugin.demo:main", "distil a small real model both ways, and verify its lineage"),
    "capture": Command("kd_plugin.cli.capture:main", "store a teacher's outputs once, as a teacher cache"),
    "trace": Command("kd_plugin.cli.runs:trace", "show saved rollouts as one page, each token by its correction"),
    "cache": Command("kd_plugin.cli.cache:main", "inspect, verify, extend and join teacher caches"),
    "offline": Command("kd_plugin.cli.training:offline", "train a student on a teacher cache, from YAML (extra: trl)"),
    "panel": Command("kd_plugin.cli.training:panel", "train a student on-policy with several teachers (extra: trl)"),
    "plan": Command("kd_plugin.cli.plan:main", "whether a run fits, with which ZeRO stage, at which price"),
    "doctor": Command("kd_plugin.cli.runs:doctor", "check a launch on all ranks before it trains"),
    "consolidate": Command(
        "kd_plugin.cli.runs:consolidate", "join a ZeRO checkpoint into one model (extra: deepspeed)"
    ),
    "lineage": Command("kd_plugin.cli.lineage:main", "show and verify who taught a checkpoint, under which terms"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kd-plugin ARGV`` and return its exit code.

    Exit codes: 0 done, 1 refused with one clear line on stderr, 2 wrong usage, 130 interrupted. A command may
    have codes of its own; its ``--help`` lists them.

    Args:
        argv: the arguments after the program's name; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("KD_PLUGIN_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_OK if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        from kd_plugin import __version__

        print(f"kd-plugin {__version__}")
        return EXIT_OK
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        known = list(COMMANDS)
        print(
            f"kd-plugin: there is no command {name!r}.{nearest(name, known)} Commands: {', '.join(known)}.",
            file=sys.stderr,
        )
        return EXIT_USAGE
    try:
        return COMMANDS[name].run(rest)
    except ModuleNotFoundError as error:
        if debug or error.name not in EXTRAS:
            raise
        print(
            f"kd-plugin {name}: needs the package {error.name!r}, which is not installed. "
            f"pip install 'kd-plugin[{EXTRAS[error.name]}]'",
            file=sys.stderr,
        )
        return EXIT_ERROR
    except KDError as error:
        if debug:
            raise
        print(f"kd-plugin {name}: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", EXIT_ERROR))
    except KeyboardInterrupt:
        print(f"\nkd-plugin {name}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Without this the interpreter complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: kd-plugin COMMAND [options]

Distillation for the trainers you already use, with license lineage in every checkpoint.

commands:
{commands}

options:
  --version   print the version
  --debug     show the traceback of an error (also: KD_PLUGIN_DEBUG=1)

Start with `kd-plugin demo`. Every command explains itself: `kd-plugin COMMAND --help`.
A command with settings takes them from YAML, and each one on the command line:
  kd-plugin demo --config                      print the settings as YAML
  kd-plugin demo --config mine.yaml --seed 1   take a file, override one setting"""
