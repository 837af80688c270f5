"""The ``kd-plugin`` command: finds the sub-command, and turns errors into a few clear lines."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from kd_plugin.cli.parsing import forget_given, place_of
from kd_plugin.errors import ConfigError, KDError, UsageError, nearest

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
# Warnings of transformers 5.23 about names that TRL 1.16 uses, and of torch about those that DeepSpeed 0.19 uses and of
# pinned memory on a CPU
_NOISE = (
    r".*gradient_checkpointing\w*` is deprecated",
    r"'pin_memory' argument is set as true but no accelerator",
    r"`torch\.distributed\.\w+` is deprecated",
)
_LINES, _WIDTH = 6, 120  # of a message at most


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        target: ``module:function``, imported only when the command is called; the function takes the arguments after
            the command's name and returns the exit code.
        summary: what it does.
        group: what people want to do with it.
        misconfigured: exit code where a setting is wrong.
        goes_on: how an interrupted one is gone on with; empty where nothing is kept.
    """

    target: str
    summary: str
    group: str = ""
    misconfigured: int = EXIT_USAGE
    goes_on: str = ""

    def run(self, argv: Sequence[str]) -> int:
        """Import the function and call it."""
        module, _, function = self.target.partition(":")
        return int(getattr(import_module(module), function)(argv))


_AGAIN, _RESUMED = (
    " Run the same command again to go on.",
    " `--resume_from_checkpoint true` goes on from the last checkpoint.",
)
FIRST, OFFLINE, PANEL, BEFORE, AFTER = (
    "Start here",
    "Distil from outputs captured once",
    "Distil while the student generates",
    "Before a run",
    "After a run",
)
COMMANDS = {
    "demo": Command(
        "kd_plugin.demo:main", "distil a small real model both ways, and verify its lineage", FIRST, goes_on=_AGAIN
    ),
    "run": Command(
        "kd_plugin.cli.recipe.command:main",
        "do all of a distillation that one YAML file describes",
        FIRST,
        goes_on=_AGAIN,
    ),
    "completion": Command("kd_plugin.cli.described:completion", "complete commands and options in your shell", FIRST),
    "capture": Command(
        "kd_plugin.cli.capture:main", "store a teacher's outputs once, as a teacher cache", OFFLINE, goes_on=_AGAIN
    ),
    "cache": Command("kd_plugin.cli.cache:main", "inspect, verify, extend and join teacher caches", OFFLINE),
    "offline": Command(
        "kd_plugin.cli.training:offline", "train a student on a teacher cache (extra: trl)", OFFLINE, goes_on=_RESUMED
    ),
    "panel": Command(
        "kd_plugin.cli.training:panel", "train a student with several teachers (extra: trl)", PANEL, goes_on=_RESUMED
    ),
    "trace": Command("kd_plugin.cli.runs:trace", "show saved rollouts as one page, token by token", PANEL),
    "pilot": Command(
        "kd_plugin.cli.evaluation:pilot",
        "which method for your task and your budget: short runs at equal cost",
        BEFORE,
        goes_on=_AGAIN,
    ),
    "plan": Command("kd_plugin.cli.plan:main", "whether a run fits, with which ZeRO stage, at which price", BEFORE),
    "doctor": Command("kd_plugin.cli.runs:doctor", "check a launch on all ranks before it trains", BEFORE),
    "report": Command("kd_plugin.cli.runs:report", "draw a run's logs as one page", AFTER),
    "lineage": Command(
        "kd_plugin.cli.lineage:main", "show and verify who taught a checkpoint, and its terms", AFTER, 1
    ),
    "evaluate": Command(
        "kd_plugin.cli.evaluation:evaluate",
        "how good a model is on your own questions, and how sure that is",
        AFTER,
        goes_on=_AGAIN,
    ),
    "ladder": Command(
        "kd_plugin.cli.evaluation:ladder",
        "the smallest student that is good enough, found from below",
        AFTER,
        goes_on=_AGAIN,
    ),
    "consolidate": Command(
        "kd_plugin.cli.runs:consolidate", "join a ZeRO checkpoint into one model (extra: deepspeed)", AFTER
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kd-plugin ARGV`` and return its exit code.

    Exit codes: 0 done, 1 refused, 2 wrong usage, 130 interrupted; 1 and 2 with at most six lines on stderr. A command
    may have codes of its own; its ``--help`` lists them.

    Args:
        argv: the arguments after the program's name; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        from kd_plugin.cli.described import complete

        complete()
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
    forget_given()
    quiet()
    try:
        if {"-h", "--help"} & set(rest):
            from kd_plugin.cli.described import help_of

            print(help_of(name, rest), end="")
            return EXIT_OK
        return COMMANDS[name].run(rest)
    except ModuleNotFoundError as error:
        if debug or error.name not in EXTRAS:
            raise
        return _refuse(
            f"kd-plugin {name}: needs the package {error.name!r}, which is not installed. "
            f"pip install 'kd-plugin[{EXTRAS[error.name]}]'"
        )
    except ConfigError as error:
        if debug:
            raise
        command = getattr(error, "command", "") or f"kd-plugin {name}"
        usage = isinstance(error, UsageError)
        message = _short(f"{command}: {'' if usage else place_of(str(error))}{_as_typed(str(error))}")
        code = EXIT_USAGE if usage else COMMANDS[name].misconfigured
        return _refuse(f"{message}\nMore: {command} --help" if usage else message, code=code)
    except KDError as error:
        if debug:
            raise
        return _refuse(f"kd-plugin {name}: {_as_typed(str(error))}", code=int(getattr(error, "exit_code", EXIT_ERROR)))
    except KeyboardInterrupt:
        print(f"\nkd-plugin {name}: interrupted.{COMMANDS[name].goes_on}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Without this the interpreter complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def quiet() -> None:
    """Keep other libraries from warning of what a user of these commands can do nothing about."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _refuse(message: str, code: int = EXIT_ERROR) -> int:
    """Say on stderr what is wrong, and return the exit code."""
    print(message, file=sys.stderr)
    return code


def _as_typed(message: str) -> str:
    """Say a way out that Python would take as it is typed for a command, or written into its YAML."""
    message = re.sub(r"trainer\.train\((\w+)=True\)", r"`--\1 true`", message)
    return re.sub(r"\b([a-z_]+)=(True|False)\b", lambda found: f"`{found[1]}: {found[2].lower()}`", message)


def _short(message: str) -> str:
    """Shorten what is longer than a few lines of a terminal."""
    if sum(-(-max(1, len(line)) // _WIDTH) for line in message.splitlines()) < _LINES:
        return message
    return textwrap.shorten(" ".join(message.split()), _WIDTH * (_LINES - 2), placeholder=" ... (--debug shows all)")


def _help() -> str:
    width = max(map(len, COMMANDS))
    groups = dict.fromkeys(command.group for command in COMMANDS.values())
    commands = "\n\n".join(
        f"{group}:\n"
        + "\n".join(f"  {name:<{width}}  {one.summary}" for name, one in COMMANDS.items() if one.group == group)
        for group in groups
    )
    return f"""\
usage: kd-plugin COMMAND [options]

Distillation for the trainers you already use, with license lineage in every checkpoint.

{commands}

options:
  --version   print the version
  --debug     show the traceback of an error (also: KD_PLUGIN_DEBUG=1)

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted; the help of a command lists its own.

Start with `kd-plugin demo`. Every command explains itself: `kd-plugin COMMAND --help`.
A command with settings takes them from YAML, and each one on the command line:
  kd-plugin demo --config                      print the settings as YAML
  kd-plugin demo --config mine.yaml --seed 1   take a file, override one setting"""
