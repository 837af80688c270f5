"""Settings of a command: a dataclass, filled from defaults, a YAML file and the command line, in this order."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kd_plugin.errors import ConfigError, nearest

Settings = TypeVar("Settings")


def make_parser(cls: type[Settings], command: str, description: str, defaults: Settings | None = None) -> Any:
    """Build the parser of a command whose settings are the fields of ``cls``.

    Add options that are no settings (``--fresh``) to what is returned, then call :func:`parse_settings`.

    Args:
        cls: a dataclass; its docstring's ``Attributes`` become the help of the options.
        command: the words after ``kd-plugin``.
        description: what ``--help`` says first.
        defaults: an instance whose values stand in for the fields' own defaults.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=f"kd-plugin {command}", description=description, exit_on_error=False)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="A YAML file with these settings; without a file: print them as YAML.",
    )
    parser.add_class_arguments(cls)
    if defaults is not None:
        parser.set_defaults(dataclasses.asdict(defaults))  # type: ignore[call-overload]
    return parser


def parse_settings(parser: Any, cls: type[Settings], argv: Sequence[str]) -> tuple[Settings, Mapping[str, Any]]:
    """Parse ``argv``; ``--config`` with no file after it prints the settings and exits, as ``--print_config``.

    Returns:
        The settings, and the values of the options that are no settings.

    Raises:
        ConfigError: an unknown option or YAML key (naming the nearest), a value of the wrong type, or a file
            that is missing or no YAML.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = _print_config_where_bare(argv)
    for path in _config_files(arguments):
        _check_keys(path, names)
    try:
        parsed = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), arguments, names)) from error
    values = {name: parsed.pop(name) for name in names}
    parsed.pop("config", None)
    return cls(**values), parsed


def _print_config_where_bare(argv: Sequence[str]) -> list[str]:
    arguments = list(argv)
    for i, argument in enumerate(arguments):
        if argument == "--config" and (i + 1 == len(arguments) or arguments[i + 1].startswith("--")):
            arguments[i] = "--print_config"
    # jsonargparse prints at once when it meets the option; last, so that it sees every override.
    if "--print_config" in arguments:
        arguments = [a for a in arguments if a != "--print_config"] + ["--print_config"]
    return arguments


def _config_files(arguments: Sequence[str]) -> list[str]:
    after = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == "--config"]
    return after + [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]


def _check_keys(path: str, known: list[str]) -> None:
    """Refuse a file that is missing, malformed, or holds an unknown key."""
    if not Path(path).is_file():
        raise ConfigError(f"--config {path}: there is no such file. `--config` alone prints one to start from.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise ConfigError(f"{path}:{where} not valid YAML ({getattr(error, 'problem', error)}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `name: value` lines, found {type(content).__name__}.")
    for key in content:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}.{nearest(str(key), known)} Known keys: {', '.join(known)}.")


def _one_line(message: str, arguments: Sequence[str], names: list[str]) -> str:
    """Shorten jsonargparse's message, and name the nearest option where one is unknown."""
    for argument in arguments:
        option = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and "nrecognized" in message and option not in names:
            return f"unknown option {argument!r}.{nearest(option, names)} Known options: {', '.join(names)}."
    return " ".join(message.split())
