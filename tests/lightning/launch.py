"""Starting the ranks of a run on this machine: processes with the environment that a launcher would give them."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Importing these takes a process longer than most runs here, so each rank is forked from one that has them
HEAVY = [
    "torch",
    "transformers",
    "datasets",
    "peft",
    "trl",
    "lightning.pytorch",
    "kd_plugin.trl",
    "kd_plugin.lightning",
]


def run_ranks(module, arguments, ranks, timeout=600):
    """Run ``python -m module arguments`` on each rank to its end; the output of a rank that fails is the message.

    Returns:
        What the first rank printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)  # of the first that starts the server, which may be another test
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, str(rank)) for rank in range(ranks)]
        started = [
            context.Process(
                target=run_rank,
                args=(module, [*map(str, arguments)], common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output),
            )
            for rank, output in enumerate(outputs)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in started:
                process.start()
            for process in started:
                process.join(max(deadline - time.monotonic(), 0.1))
        finally:
            codes = [process.exitcode for process in started]
            for process in started:
                process.kill()
                process.join()
        said = [output.read_text(errors="replace") if output.exists() else "" for output in outputs]
    ends = [f"exit code {code}: {text}" for code, text in zip(codes, said, strict=True) if code != 0]
    failed = [text.rpartition("job: ")[2].split("\n")[0] + "\n" + text[-3000:] for text in ends]
    assert not failed, failed[0]
    return said[0]


def run_rank(module, arguments, environment, output):
    """Be one rank: what ``python -W ignore -m module`` does, with this environment and its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)  # the process that this one was forked from may have read another number
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
