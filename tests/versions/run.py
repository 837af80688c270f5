"""Run a part of the tests at both ends of the supported versions, each in an environment of its own.

python -m tests.versions.run [ENVIRONMENT ...] [--table FILE] [--only install|test]     (`make test-versions`)

The environments are made by uv, in .venv-versions, from the bounds in pyproject.toml; files that they share lie on the
disk once. environments.toml says which they are and what runs in them.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv-versions"
UV = Path(sys.executable).with_name("uv")
SHOWN = ("torch", "transformers", "trl", "lightning", "deepspeed", "peft", "accelerate", "datasets", "numpy", "pyarrow")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "cyclonedx-python-lib", "spdx-python-model")
LEFT_OUT = "not slow and not wheel and not vllm"


@dataclass(frozen=True)
class Outcome:
    """What an environment holds, and how its tests went.

    Attributes:
        name: of the environment.
        versions: of the libraries in :data:`SHOWN`.
        counts: of its tests by outcome, as pytest counts them.
    """

    name: str
    versions: Mapping[str, str]
    counts: Mapping[str, int]

    @property
    def is_good(self) -> bool:
        """Whether tests ran, and none failed."""
        return bool(self.counts.get("passed")) and not (self.counts.get("failed") or self.counts.get("error"))


def main(argv: Sequence[str] | None = None) -> int:
    known = tomllib.loads(Path(__file__).with_name("environments.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", help=f"which of {', '.join(known)}; all if left out")
    parser.add_argument("--only", choices=("install", "test"), help="one of the two steps")
    parser.add_argument("--table", type=Path, help="write the table there as well, as Markdown")
    parser.add_argument("--workers", type=int, default=1, help="tests side by side")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.environments) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected one of {', '.join(known)}")
    outcomes = []
    for name in arguments.environments or known:
        python = PLACE / name / "bin" / "python"
        if arguments.only != "test":
            install(python, known[name])
        if arguments.only != "install":
            outcomes.append(Outcome(name, versions(python), run_tests(python, known[name], arguments.workers)))
    if arguments.only == "install":
        return 0
    table = as_table(outcomes)
    print(table)
    if arguments.table:
        arguments.table.write_text(table, encoding="utf-8")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def install(python: Path, environment: Mapping[str, Any]) -> None:
    """Make an environment: what the bounds of pyproject.toml resolve to, the tests' tools, and this checkout."""
    print(f"Installing {python.parents[1].name} ...", flush=True)
    lock = python.parents[1].with_suffix(".txt")
    PLACE.mkdir(exist_ok=True)
    pins = lock.with_suffix(".in")
    pins.write_text("\n".join(environment["pins"]))
    uv("pip", "compile", "-q", "--resolution", environment["resolution"], "--extra", "all", "--output-file", lock,
       "--override", pins, "--python", sys.executable, "pyproject.toml")  # fmt: skip
    if not python.exists():
        uv("venv", "-q", "--python", sys.executable, python.parents[1])
    # A tool that asks for a newer one of what is supported gets the one that is supported
    uv("pip", "install", "-q", "--python", python, "--requirement", lock, "--override", lock, *tools(), "setuptools")
    uv("pip", "install", "-q", "--python", python, "--no-deps", "--editable", ".")


def tools() -> list[str]:
    """Return what the tests themselves need, as the extra ``dev`` has it: not what only style and pictures need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = re.compile(rf"({'|'.join(TOOLS)})(?![\w-])")
    return [line for line in project["optional-dependencies"]["dev"] if wanted.match(line)]


def uv(*words: object) -> None:
    """Run uv in the checkout."""
    subprocess.run([str(UV), *map(str, words)], check=True, cwd=ROOT)


def versions(python: Path) -> dict[str, str]:
    """Return what is installed of :data:`SHOWN`."""
    asked = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    found = subprocess.run([str(python), "-c", asked], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(SHOWN, found, strict=True))


def run_tests(python: Path, environment: Mapping[str, Any], workers: int) -> dict[str, int]:
    """Run the tests of an environment, those of several ranks one after another, and count their outcomes."""
    counts: dict[str, int] = {}
    for tests, marks in ((environment["tests"], f"{LEFT_OUT} and not zero"), (environment["zero"], LEFT_OUT)):
        if not tests:
            continue
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *tests]
        if workers > 1 and tests is not environment["zero"]:
            command += ["-n", str(workers), "--dist", "loadfile"]
        shown = _watched(command, python)
        for count, outcome in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed)", shown.splitlines()[-1]):
            counts[outcome] = counts.get(outcome, 0) + int(count)
    return counts


def _watched(command: Sequence[str], python: Path) -> str:
    """Run a command that prints here, and return what it printed; its extensions of torch are kept apart."""
    own = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # ranks find this environment's ninja
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "torch_extensions"),
    }
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines) or "nothing ran"


def as_table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table, a column an environment."""
    rows = [["", *(f"`{one.name}`" for one in outcomes)], ["---"] * (len(outcomes) + 1)]
    rows += [[name, *(one.versions[name] for one in outcomes)] for name in SHOWN]
    for outcome in ("passed", "failed", "skipped"):
        rows.append([outcome, *(str(one.counts.get(outcome, 0)) for one in outcomes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
