"""Runs a job on several CPU ranks under a real launcher, and hands back what each rank wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

CHECKOUT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """Return an environment for one rank: CPU DeepSpeed, one thread, accelerate told that DeepSpeed is on."""
    return {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(ranks: int, port: int | None = None, python: str = sys.executable) -> list[str]:
    """Return the command line that launches ``ranks`` ranks of the worker on this machine."""
    launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, "--master_port", str(port or free_port()), "-m", "tests.zero.worker"]


def run(job: dict, directory: Path, ranks: int = 2, timeout: int = 900) -> list[dict]:
    """Run ``job`` (see tests/zero/worker.py) and return each rank's report.

    Raises:
        AssertionError: the launcher failed, or is not done after ``timeout`` seconds; carries the end of its output.
    """
    return run_all({"": job}, directory, ranks, timeout, job.get("env", {}))[""]


def run_all(
    jobs: dict[str, dict],
    directory: Path,
    ranks: int = 2,
    timeout: int = 900,
    env: dict[str, str] | None = None,
    python: str = sys.executable,
) -> dict[str, list[dict]]:
    """Run named jobs one after another in the same processes, which costs one start; return each one's reports."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.json"
    path.write_text(json.dumps({"jobs": jobs}))
    code, output = ended([*torchrun(ranks, python=python), str(path)], environment(**(env or {})), timeout)
    assert code == 0, _tracebacks(output)
    return {name: reports(directory, ranks, name) for name in jobs}


def ended(command: list[str], env: dict[str, str], timeout: int) -> tuple[int, str]:
    """Run a launcher and return its exit code and output; after ``timeout`` seconds end it with all its ranks.

    A launcher that is killed alone leaves ranks behind, which slow every test that follows.

    Raises:
        AssertionError: it took longer; carries the end of its output.
    """
    launcher = subprocess.Popen(
        command, env=env, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = launcher.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        family = [*psutil.Process(launcher.pid).children(recursive=True), launcher]
        for process in family:
            process.kill()
        output = launcher.communicate()[0]
        wait_for_the_end(family)
        raise AssertionError(f"Not done after {timeout} s. The last that was said: {output[-3000:]}") from None
    return launcher.returncode, output


def wait_for_the_end(processes: Sequence[psutil.Process | subprocess.Popen], seconds: float = 60.0) -> None:
    """Wait for processes that were killed: on a loaded machine one is still running for a while.

    Raises:
        AssertionError: one is still running.
    """
    left, latest = [process.pid for process in processes], time.monotonic() + seconds
    while left := [pid for pid in left if is_running(pid)]:
        assert time.monotonic() < latest, f"Still running after {seconds:.0f} s: {left}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def reports(directory: Path, ranks: int, name: str = "") -> list[dict]:
    return [json.loads((directory / f"rank{rank}{name and '-' + name}.json").read_text()) for rank in range(ranks)]


def _tracebacks(output: str) -> str:
    """Return what the ranks said of their end, or else the end of all: behind it stands the launcher's own report."""
    said = [line for line in output.splitlines() if line.startswith("[rank")]
    return "\n".join(said)[-9000:] or output[-9000:]
