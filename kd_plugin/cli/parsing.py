"""The parser of all commands: options and YAML from dataclasses, and errors that name the file, the line and the key.

Settings of a command are a dataclass, filled from defaults, a YAML file and the command line, in this order.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_origin, get_type_hints

import yaml

from kd_plugin.cli.values import kinds_of, value_of, value_of_words
from kd_plugin.errors import ConfigError, UsageError, nearest, require_known_keys
from kd_plugin.inputs import YamlFile
from kd_plugin.upstream import option_names, subcommands

Settings = TypeVar("Settings")
_GIVEN: ContextVar[Given | None] = ContextVar("given", default=None)  # to the command that runs
_METAVARS = {bool: "true|false", int: "N", float: "X", dict: "{KEY: VALUE}", list: "VALUE"}


class Described(Exception):
    """Carries a parser out of the command that built it; see :func:`parser_of`."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """``argparse`` that prints no usage when something is wrong, but raises an error that names what is near."""

    described = False  # whether parse_args hands out the parser instead, see `parser_of`

    def __init__(self, prog: str, **kwargs: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, **{"formatter_class": formatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing it under the usage."""
        choice = re.match(r"argument ([^:]+): invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            known = [word.strip("' ") for word in choice[3].split(",")]
            message = f"{choice[1]}: unknown {choice[2]!r}.{nearest(choice[2], known)} Known: {', '.join(known)}."
        raise UsageError(message.removeprefix("argument "), self.prog)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; unlike argparse's own, an unknown option is told with the known one that is near."""
        if Parser.described:
            raise Described(self)
        found, extra = self.parse_known_args(args, namespace)
        if not extra:
            return found
        asked: argparse.ArgumentParser = self
        for word in sys.argv[1:] if args is None else args:
            asked = subcommands(asked).get(word, asked)
        options = [word for word in extra if word.startswith("-")]
        if options:
            option = options[0].split("=")[0]
            raise UsageError(f"unknown option {option}.{nearest(option, option_names(asked))}", asked.prog)
        meant = f" Did you mean --config {extra[0]}?" if extra[0].endswith((".yaml", ".yml")) else ""
        raise UsageError(f"unexpected argument {extra[0]!r}.{meant}", asked.prog)

    def add_fields(
        self, cls: type, names: Sequence[str] | None = None, *, title: str = "", hidden: bool = False
    ) -> None:
        """Add an option for each field of a dataclass, in a group of its own if that has a title.

        Args:
            cls: the dataclass.
            names: which fields; None takes all.
            title: of the group.
            hidden: whether ``--help`` leaves them out.
        """
        hints, help_of = get_type_hints(cls), sentences(cls)
        group = self.add_argument_group(title) if title else self
        for field in dataclasses.fields(cls):
            if names is not None and field.name not in names:
                continue
            kinds = kinds_of(hints[field.name])
            options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "metavar": _metavar(kinds)}
            options["help"] = argparse.SUPPRESS if hidden else _sentence(field, help_of.get(field.name, ""))
            if bool in kinds:
                options |= {"nargs": "?", "const": "true"}
            elif any(get_origin(kind) is list or kind is list for kind in kinds):
                options["nargs"] = "+"
            spelled = {f"--{field.name}": None, f"--{field.name.replace('_', '-')}": None}
            group.add_argument(*spelled, **options)
            if bool in kinds:
                no = (f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}")
                group.add_argument(*no, dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS,
                                   default=argparse.SUPPRESS)  # fmt: skip


def parser_of(run: Callable[[Sequence[str]], Any], argv: Sequence[str] = ()) -> Parser:
    """Return the parser that a command builds, without running the command."""
    Parser.described = True
    try:
        run(argv)
    except Described as found:
        return found.parser
    finally:
        Parser.described = False
    raise TypeError(f"{run} parses nothing")


@dataclass(frozen=True)
class Given:
    """What a user set, by field, as text or as YAML nodes.

    Attributes:
        words: from the command line: one text each, or a list of them.
        file: the YAML file, or None.
    """

    words: Mapping[str, Any]
    file: YamlFile | None = None

    def values(self, hints: Mapping[str, Any], elsewhere: Sequence[str] = ()) -> dict[str, Any]:
        """Return the values of those fields that are given, each of the type of its hint.

        Args:
            hints: types by field.
            elsewhere: keys of the file that are read by somebody else.

        Raises:
            UsageError: an unknown key of the file, or a value of another type: names the file, the line and the key.
        """
        found: dict[str, Any] = {}
        if self.file is not None:
            for key, node in self.file.nodes.items():
                if key not in elsewhere:
                    with self.usage():
                        require_known_keys([key], [*hints], self.file.where(key))
                    found[key] = value_of(node, hints[key], f"{self.file.where(key)}: {key}")
        for name, word in self.words.items():
            found[name] = value_of_words(word, hints[name], f"--{name}")
        return found

    @contextmanager
    def usage(self) -> Any:
        """Let errors about settings name the file and the line of the key that they are about."""
        try:
            yield
        except UsageError:
            raise
        except (ConfigError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UsageError(textwrap.shorten(self.place(text) + text, 600)) from error

    def place(self, message: str) -> str:
        """Return ``"FILE, line N: "`` of the key of the file that a message names; empty if it names none."""
        if self.file is None or str(self.file.path) in message:
            return ""
        place = self.file.place(message, aside=self.words)
        return "" if place is None else f"{place}: "


@dataclass(frozen=True)
class CommandLine(Generic[Settings]):
    """What a command line said.

    Attributes:
        settings: the filled dataclass.
        flags: the flags that were given.
        print_only: the user asked to see the settings, not to run.
        file: the YAML file, or None.
    """

    settings: Settings
    flags: frozenset[str]
    print_only: bool
    file: YamlFile | None = None

    def shown(self) -> bool:
        """Print the settings as YAML where the user asked to see them; return whether that is so."""
        if self.print_only:
            print(as_yaml(self.settings))
        return self.print_only


def parse_settings(
    cls: type[Settings],
    argv: Sequence[str],
    *,
    command: str,
    description: str,
    defaults: Settings | None = None,
    flags: Mapping[str, str] | None = None,
) -> CommandLine[Settings]:
    """Parse ``argv`` into the dataclass ``cls``.

    ``--config FILE`` takes YAML whose keys are the fields; every field is also an option, and wins over the
    file. ``--config`` with no file after it, or ``--print_config``, asks for the settings as YAML.

    Args:
        cls: a dataclass; each field's help is the help of its option.
        argv: the arguments after the command's name.
        command: the words after ``kd-plugin``.
        description: what ``--help`` says first.
        defaults: an instance whose values stand in for the fields' own defaults.
        flags: options without a value that are no settings, with their help, such as ``{"fresh": ...}``.

    Raises:
        UsageError: an unknown option or YAML key (naming the nearest), a value of the wrong type or that the settings
            refuse, or a file that is missing or no YAML.
    """
    usage = f"kd-plugin {command} [--config FILE] [--OPTION VALUE ...]"
    parser = Parser(f"kd-plugin {command}", usage=usage, description=description)
    add_config(parser)
    for name, text in (flags or {}).items():
        spelled = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*spelled, dest=name, action="store_true", help=text)
    parser.add_fields(cls)
    words = vars(parser.parse_args(list(argv)))
    given, print_only = take_config(words)
    asked = frozenset(name for name in flags or {} if words.pop(name))
    start = {} if defaults is None else {f.name: getattr(defaults, f.name) for f in dataclasses.fields(defaults)}  # type: ignore[arg-type]
    values = given.values(get_type_hints(cls))
    with given.usage():
        filled = cls(**{**start, **values})
    return CommandLine(settings=filled, flags=asked, print_only=print_only, file=given.file)


def require_set(settings: Any, names: Sequence[str], command: str = "") -> None:
    """Refuse settings without what a command cannot do without.

    Args:
        settings: of the command.
        names: of those that it needs.
        command: as it is typed, where it is a command of a command.

    Raises:
        UsageError: one of ``names`` is not set.
    """
    for name in names:
        if not getattr(settings, name):
            raise UsageError(f"{name} is not set. Give --{name}, or `{name}:` in the --config file.", command)


def add_config(parser: Parser, printed: bool = True) -> None:
    """Add ``--config``, and what prints the settings."""
    said = "a YAML file with these settings; without a file: print them as YAML" if printed else ""
    parser.add_argument(
        "--config", metavar="FILE", nargs="?", const="", help=said or "a YAML file whose keys are the options below"
    )
    if printed:
        parser.add_argument("--print_config", "--print-config", action="store_true", help=argparse.SUPPRESS)


def take_config(words: dict[str, Any]) -> tuple[Given, bool]:
    """Take what :func:`add_config` added out of the parsed words: what is given, and whether to print the settings."""
    config = words.pop("config")
    print_only = bool(words.pop("print_config", False)) or config == ""
    given = Given(words, YamlFile.read(config) if config else None)
    _GIVEN.set(given)
    return given, print_only


def typed_section(file: YamlFile, name: str, classes: Sequence[type]) -> dict[str, Any]:
    """Return a mapping of a file whose keys are fields of some dataclasses, each value of the type of its field.

    Raises:
        UsageError: an unknown key, naming the nearest, or a value of another type: names the file and the line.
    """
    hints = {field: hint for cls in reversed(classes) for field, hint in get_type_hints(cls).items()}
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    found = {}
    for key, node in file.nodes[name].value:
        place = f"{file.path}, line {key.start_mark.line + 1}: {name}"
        if key.value not in known:
            raise UsageError(f"{place}: unknown key {key.value!r}.{nearest(key.value, sorted(known))}")
        found[key.value] = value_of(node, hints[key.value], f"{place}.{key.value}")
    return found


def written_for(name: str, argv: Sequence[str]) -> str | None:
    """Return what a command line, or else the file of its ``--config``, writes for one setting, as text.

    It is for a command whose other settings depend on that one.

    Raises:
        UsageError: the file cannot be read.
    """
    parser = Parser("", add_help=False)
    parser.add_argument("--config", nargs="?", default="", const="")
    parser.add_argument(f"--{name}")
    found, _ = parser.parse_known_args([*argv])
    said = getattr(found, name)
    if said is None and found.config:
        said = getattr(YamlFile.read(found.config).nodes.get(name), "value", None)
    return said if isinstance(said, str) else None


def forget_given() -> None:
    """Start a command that was given nothing yet."""
    _GIVEN.set(None)


def place_of(message: str) -> str:
    """Return ``"FILE, line N: "`` of the setting that an error of the running command is about; empty if none is."""
    given = _GIVEN.get()
    return "" if given is None else given.place(message)


@contextmanager
def for_the_user(path: Path) -> Iterator[None]:
    """Let errors about a file that a command wrote for the user be about the settings that the user gave.

    Args:
        path: of the file.

    Raises:
        ConfigError: in the place of one that names the file.
    """
    given = _GIVEN.get()
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(rf"{re.escape(str(path))}(, line \d+)?: ", "", str(error))) from error
    finally:
        _GIVEN.set(given)


@contextmanager
def naming(named: Any) -> Iterator[None]:
    """Let an error about a setting say where it stands in another file, if a user named one for it.

    Args:
        named: path of a YAML file, or settings that stand in the command's own file.

    Raises:
        UsageError: in the place of a ConfigError about something in that file.
    """
    try:
        yield
    except UsageError:
        raise
    except ConfigError as error:
        place = YamlFile.read(named).place(str(error)) if isinstance(named, str) else None
        if place is None:
            raise
        raise UsageError(f"{place}: {error}") from error


def as_yaml(settings: Any) -> str:
    """Write settings as YAML, each under the sentence that explains it."""
    help_of = sentences(type(settings))
    lines = []
    for field in dataclasses.fields(settings):
        comment = help_of.get(field.name, "")
        lines += textwrap.wrap(comment, 116, initial_indent="# ", subsequent_indent="# ")
        lines.append(yaml.safe_dump({field.name: getattr(settings, field.name)}, width=1000).rstrip())
    return "\n".join(lines)


def sentences(cls: type) -> dict[str, str]:
    """Return the help of each field: of its declaration, or of the docstring's ``Attributes``."""
    _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = None
    for line in listed.split("\n\n")[0].splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name is not None:
            found[name] += " " + line.strip()
    said = {f.name: " ".join(str(f.metadata["help"]).split()) for f in dataclasses.fields(cls) if "help" in f.metadata}
    return {**found, **said}


def _metavar(kinds: Sequence[Any]) -> str:
    for kind in kinds:
        for known, word in _METAVARS.items():
            if (kind is known or get_origin(kind) is known) and (known is not dict or str not in kinds):
                return word
    return "VALUE"


def _sentence(field: dataclasses.Field[Any], said: str) -> str:
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    said = said.strip()
    if default not in (None, "", dataclasses.MISSING) and default != [] and default != {}:
        said += f" (default: {default})"
    return said.replace("%", "%%")
