"""The ``kd-plugin`` command: finds the sub-command, runs it, and turns errors into one clear line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from kd_plugin.errors import KDError, nearest


@dataclass(frozen=True)
class Command:
    """A sub-command: ``module`` has ``main(argv) -> int`` and is imported only when the command is called."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("kd_plugin.cli.demo", "distil a small real model both ways, and verify its lineage"),
    "capture": Command("kd_plugin.cli.capture", "store a teacher's outputs once, as a teacher cache"),
    "trace": Command("kd_plugin.cli.trace", "show saved rollouts as one page, each token by its correction"),
    "cache": Command("kd_plugin.cli.cache", "inspect, verify, extend and join teacher caches"),
    "offline": Command("kd_plugin.cli.offline", "train a student on a teacher cache, from YAML (extra: trl)"),
    "panel": Command("kd_plugin.cli.panel", "train a student on-policy with several teachers, from YAML (extra: trl)"),
    "plan": Command("kd_plugin.cli.plan", "whether a run fits, with which ZeRO stage, at which price; writes configs"),
    "doctor": Command("kd_plugin.cli.doctor", "check a launch on all ranks before it trains"),
    "consolidate": Command("kd_plugin.cli.consolidate", "join a ZeRO checkpoint into one model (extra: deepspeed)"),
    "lineage": Command("kd_plugin.cli.lineage", "show and verify who taught a checkpoint, under which terms"),
}

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
        return import_module(COMMANDS[name].module).main(rest)
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
