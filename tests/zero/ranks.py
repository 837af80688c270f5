"""Runs a job on several CPU ranks under a real launcher, and hands back what each rank wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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


def torchrun(ranks: int, port: int | None = None) -> list[str]:
    """Return the command line that launches ``ranks`` ranks of the worker on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, "--master_port", str(port or free_port()), "-m", "tests.zero.worker"]


def run(job: dict, directory: Path, ranks: int = 2, timeout: int = 300) -> list[dict]:
    """Run ``job`` (see tests/zero/worker.py) and return each rank's report.

    Raises:
        AssertionError: the launcher failed; carries the end of its output.
        subprocess.TimeoutExpired: it hangs.
    """
    return run_all({"": job}, directory, ranks, timeout, job.get("env", {}))[""]


def run_all(
    jobs: dict[str, dict], directory: Path, ranks: int = 2, timeout: int = 300, env: dict[str, str] | None = None
) -> dict[str, list[dict]]:
    """Run named jobs one after another in the same processes, which costs one start; return each one's reports."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.json"
    path.write_text(json.dumps({"jobs": jobs}))
    done = subprocess.run(
        [*torchrun(ranks), str(path)],
        env=environment(**(env or {})),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, _tracebacks(done.stdout + done.stderr)
    return {name: reports(directory, ranks, name) for name in jobs}


def reports(directory: Path, ranks: int, name: str = "") -> list[dict]:
    return [json.loads((directory / f"rank{rank}{name and '-' + name}.json").read_text()) for rank in range(ranks)]


def _tracebacks(output: str) -> str:
    """Cut a launcher's own report away, so that a rank's traceback is what a failing test shows."""
    return output.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0][-9000:-1500]
