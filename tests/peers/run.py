"""Run TRL's own tests of ``DistillationTrainer`` and ``SFTTrainer`` on TRL's classes and on ours, and compare.

python -m tests.peers.run TRL [--only PATTERN] [--table FILE]

TRL is a checkout, a bare git directory, or an archive, of a version near the installed one. It is copied into a
temporary directory; nothing of it stays. Each test that has another outcome with ours must stand in
``differences.toml`` with its reason, and each that stands there must still differ; the run fails otherwise.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIFFERENCES = Path(__file__).with_name("differences.toml")
TESTS = {
    "test_distillation_trainer.py": ("TestDistillationTrainer", "TestDistillationTrainerVLM"),
    "test_sft_trainer.py": ("TestSFTTrainer",),
}
SIDES = {"trl": "TRL", "kd_plugin": "ours"}
Outcomes = dict[str, dict[str, str]]


def main() -> int:
    """Run both sides; return 0 when all differences are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trl", type=Path, help="checkout, bare git directory, or archive of TRL")
    parser.add_argument("--only", help="as pytest's -k: a part of the tests; what is not run is not compared")
    parser.add_argument("--table", type=Path, help="write the table of outcomes there as well, as Markdown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkout, cache = Path(scratch, "trl"), Path(scratch, "cache")
        unpack(arguments.trl, checkout)
        print("Making the models and datasets that the tests read from the hub ...", flush=True)
        make_cache(checkout, cache)
        # Under another name, since `tests` is ours
        shutil.copytree(checkout / "tests", Path(scratch, "run", "trl_tests"))
        print("Running TRL's tests on TRL's classes and on ours, side by side: about half an hour ...", flush=True)
        running = {side: start(side, Path(scratch), cache, arguments.only) for side in SIDES}
        found = {side: outcomes(side, process, Path(scratch)) for side, process in running.items()}
    table = as_table(found)
    print(table)
    if arguments.table:
        arguments.table.write_text(table)
    problems = unexplained(found, tomllib.loads(DIFFERENCES.read_text())["differences"], partial=bool(arguments.only))
    print("\n".join(problems) or "Every difference is explained in tests/peers/differences.toml.")
    return 1 if problems else 0


def unpack(source: Path, directory: Path) -> None:
    """Copy a checkout, a bare git directory or an archive into ``directory``.

    Raises:
        SystemExit: it is none of these, or holds no tests.
    """
    if (source / "tests").is_dir():
        shutil.copytree(source, directory, ignore=shutil.ignore_patterns(".git", ".venv", "docs"))
    elif (source / "objects").is_dir():
        packed = directory.with_suffix(".tar")
        git = ["git", "--git-dir", str(source), "archive", "--output", str(packed), "HEAD"]
        subprocess.run(git, check=True)
        _extract(packed, directory)
    elif source.is_file() and zipfile.is_zipfile(source):
        zipfile.ZipFile(source).extractall(directory)
    elif source.is_file() and tarfile.is_tarfile(source):
        _extract(source, directory)
    else:
        raise SystemExit(f"{source} is no checkout, git directory or archive of TRL.")
    inner = [path.parent for path in directory.glob("*/tests")]
    if not (directory / "tests").is_dir() and len(inner) == 1:
        for path in inner[0].iterdir():
            shutil.move(path, directory)
    missing = [name for name in TESTS if not (directory / "tests" / name).is_file()]
    if missing:
        raise SystemExit(
            f"{source} has no tests/{missing[0]}: an archive of TRL's repository is needed, not its wheel."
        )


def _extract(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(directory, filter="data")


def start(side: str, scratch: Path, cache: Path, only: str | None) -> subprocess.Popen[bytes]:
    """Start the tests on one side's classes; their output goes to a file in ``scratch``."""
    nodes = [f"trl_tests/{file}::{name}" for file, names in TESTS.items() for name in names]
    options = ["-p", "tests.peers.plugin", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "not slow"]
    options += ["-o", "addopts=", "-o", "markers=slow", *(["-k", only] if only else [])]
    environment = {
        "KD_PEERS_CACHE": str(cache),
        "KD_PEERS_CLASSES": side,
        "KD_PEERS_REPORT": str(scratch / f"{side}.json"),
        # Of their own, or one side would find what the other left
        "HF_HOME": str(scratch / side),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    with (scratch / f"{side}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *nodes],
            cwd=scratch / "run",
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def outcomes(side: str, process: subprocess.Popen[bytes], scratch: Path) -> Outcomes:
    """Wait for one side's tests, and return each one's outcome."""
    process.wait()
    report = scratch / f"{side}.json"
    if not report.is_file():
        log = (scratch / f"{side}.log").read_text(errors="replace")
        raise SystemExit(f"pytest ended without a report on {SIDES[side]}:\n{log[-3000:]}")
    return dict(json.loads(report.read_text()))


def make_cache(checkout: Path, cache: Path) -> None:
    """Make the models and datasets in a process of its own, whose libraries are changed for it."""
    command = [sys.executable, "-m", "tests.peers.hub", str(checkout), str(cache)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"The models and datasets could not be made:\n{done.stderr[-3000:]}")


def as_table(found: dict[str, Outcomes]) -> str:
    """Return both sides' outcomes as Markdown: the sums for each file, and a line for each test."""
    names = sorted(set().union(*found.values()))
    lines = ["| file | classes | passed | failed | skipped |", "|---|---|---|---|---|"]
    for file in TESTS:
        for side, label in SIDES.items():
            counts = Counter(one["outcome"] for name, one in found[side].items() if name.startswith(file))
            lines.append(
                f"| {file} | {label} | "
                + " | ".join(str(counts[key]) for key in ("passed", "failed", "skipped"))
                + " |"
            )
    lines += ["", "| test | TRL | ours | |", "|---|---|---|---|"]
    for name in names:
        theirs, ours = (found[side].get(name, {"outcome": "not run", "why": ""}) for side in SIDES)
        why = ours["why"] or theirs["why"]
        lines.append(f"| {name} | {theirs['outcome']} | {ours['outcome']} | {why.replace('|', ' ')[:160]} |")
    return "\n".join(lines) + "\n"


def unexplained(found: dict[str, Outcomes], reasons: dict[str, str], partial: bool = False) -> list[str]:
    """Return a sentence for each difference without a reason, and for each reason without a difference.

    Args:
        found: side to test to outcome.
        reasons: test to the reason why ours differs; a name without its parameters stands for all of them.
        partial: only some of the tests were run.
    """
    problems, used = [], set()
    for name in sorted(set().union(*found.values())):
        theirs, ours = (found[side].get(name, {"outcome": "not run", "why": ""}) for side in SIDES)
        if theirs["outcome"] == ours["outcome"]:
            continue
        reason = next((key for key in (name, name.split("[")[0]) if key in reasons), None)
        if reason is None:
            problems.append(f"{name}: {theirs['outcome']} with TRL, {ours['outcome']} with ours: {ours['why']}")
        else:
            used.add(reason)
    run_names = {key for name in found["kd_plugin"] for key in (name, name.split("[")[0])}
    for name in sorted(set(reasons) - used):
        if name in run_names or not partial:
            problems.append(f"{name}: stands in differences.toml and does not differ any more; take it out.")
    return problems


if __name__ == "__main__":
    sys.exit(main())
