"""Settings of a command: a dataclass, filled from defaults, a YAML file and the command line, in this order."""

from __future__ import annotations

import dataclasses
import textwrap
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import yaml

from kd_plugin.errors import ConfigError, nearest, require_known_keys
from kd_plugin.inputs import read_yaml

Settings = TypeVar("Settings")


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
    for path in _config_files(arguments):
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


def _config_files(arguments: Sequence[str]) -> list[str]:
    after = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == "--config"]
    return after + [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
