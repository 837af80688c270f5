"""``python -m kd_plugin.lightning fit --config run.yaml``: LightningCLI over the ready modules."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from kd_plugin.errors import ConfigError, KDError, nearest, require_known_keys
from kd_plugin.inputs import YamlFile, read_yaml
from kd_plugin.lightning.data import KDDataModule
from kd_plugin.lightning.module import StudentModule
from kd_plugin.sharding import close_process_group

_TOP = (
    "seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path", "weights_only", "verbose",
    "return_predictions",
)  # fmt: skip
_COMMANDS = ("fit", "validate", "test", "predict")
_OPTIONS = ("config", "print_config", "help")


class KDCommand(LightningCLI):
    """``LightningCLI`` with the ready modules and the data module.

    Unknown keys, in files and on the command line, are refused first, by errors that name the key that was near.

    Args:
        args: the command line; None reads ``sys.argv``.
        run: False builds the trainer, the module and the data, and runs nothing.

    Raises:
        ConfigError: an unknown key or option, or a file that is missing or no YAML.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        arguments = sys.argv[1:] if args is None else list(args)
        require_known_settings(arguments)
        super().__init__(
            StudentModule,
            KDDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False, **{name: {"exit_on_error": False} for name in _COMMANDS}},
            args=arguments,
            run=run,
        )


def require_known_settings(arguments: Sequence[str]) -> None:
    """Refuse unknown keys of configuration files and unknown options.

    Raises:
        ConfigError: names the key, the nearest known one, and what is known.
    """
    model = _option(arguments, "model")
    for path in _files(arguments):
        content = read_yaml(path)
        for command in _COMMANDS:
            content = {**content, **(content.pop(command, None) or {})}
        given = content.get("model")
        if model is None and isinstance(given, Mapping):
            model = given.get("class_path")
        for name, value in content.items():
            require_known_keys([name], _TOP, path)
            if name == "model" and isinstance(value, Mapping):
                _check_model(path, value)
            elif name in ("trainer", "data") and isinstance(value, Mapping):
                require_known_keys(value, _fields(Trainer if name == "trainer" else KDDataModule), path, f"{name}.")
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        first, *rest = argument.removeprefix("--").split("=")[0].split(".")
        where = "the command line"
        require_known_keys([first], (*_TOP, *_OPTIONS), where, "--")
        if rest and first in ("trainer", "data"):
            known = _fields(Trainer if first == "trainer" else KDDataModule)
            require_known_keys([rest[0].rstrip("+")], known, where, f"--{first}.")
        elif rest and first == "model" and model is not None:
            key = rest[1] if rest[0] == "init_args" and len(rest) > 1 else rest[0]
            require_known_keys([key], (*_fields(_resolve(where, model)), "class_path"), where, "--model.")


def _check_model(path: str, given: Mapping[str, Any]) -> None:
    if "class_path" not in given:
        raise ConfigError(f"{path}: model has no class_path; choose one of {', '.join(_modules())}.")
    require_known_keys(given, ("class_path", "init_args", "dict_kwargs"), path, "model.")
    known = _fields(_resolve(path, given["class_path"]))
    require_known_keys(given.get("init_args") or {}, known, path, "model.init_args.")


def _fields(cls: type) -> list[str]:
    """Return the arguments of ``cls``, and of its parents where it passes them on."""
    found: list[str] = []
    for one in cls.__mro__:
        if "__init__" in vars(one):
            parameters = inspect.signature(one).parameters.values()
            found += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return [name for name in found if name != "self"]


def _resolve(where: str, class_path: str) -> type:
    """Return the module class that a short name or an import path names."""
    short = class_path.rsplit(".", 1)[-1]
    known = _modules()
    if short in known:
        return known[short]
    if "." in class_path:
        module, _, name = class_path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{where}: model.class_path {class_path!r} cannot be imported: {error}.") from error
    hint = nearest(class_path, list(known))
    raise ConfigError(f"{where}: unknown model.class_path {class_path!r}.{hint} Known: {', '.join(known)}.")


def _modules() -> dict[str, type]:
    """Return the ready modules by name; importing them is what lets LightningCLI find them by it."""
    import kd_plugin.lightning as host

    found = {name: getattr(host, name) for name in host.__all__}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, StudentModule)}


def _option(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of ``--name``, if it is given."""
    for value in _values(arguments, name):
        return value
    return None


def _files(arguments: Sequence[str]) -> list[str]:
    return list(_values(arguments, "config"))


def _values(arguments: Sequence[str], name: str) -> Iterator[str]:
    for i, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            yield argument.removeprefix(f"--{name}=")
        elif argument == f"--{name}" and i + 1 < len(arguments):
            yield arguments[i + 1]


def _brief(message: str) -> str:
    """Return what jsonargparse says of a value in one line: the key, what was expected, and what was found."""
    keys = [key for found in re.findall(r'Parser key "([^"]+)"', message) for key in found.split(".")]
    wrong = re.search(r"Expected (?:an? )?(.+?)\. Got value: (.*)", message)
    if not keys or wrong is None:
        return textwrap.shorten(" ".join(message.split()), 400)
    kind = re.sub(r"<class '([\w.]+)'>", r"\1", wrong[1])
    return f"{'.'.join(dict.fromkeys(keys))}: expected {kind}, found {wrong[2]!r}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a wrong setting is one message and exit code 2, another error of this package 1."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        KDCommand(argv)
    except ArgumentError as error:
        message = _brief(str(error))
        places = (YamlFile.read(path).place(message) for path in _files(arguments))
        print(f"error: {next((f'{place}: ' for place in places if place), '')}{message}", file=sys.stderr)
        return 2
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    close_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
