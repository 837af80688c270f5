"""The ``kd-plugin`` command: finds the sub-command, runs it, and turns errors into one clear line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from kd_plugin.errors import KDError, nearest

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
