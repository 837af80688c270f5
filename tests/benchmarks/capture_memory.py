"""What memory a capture takes, by the number of examples: it must not grow.

python -m tests.benchmarks.capture_memory --examples 10000 100000 1000000

A tiny model stands in for the teacher; rows come from a stream, and from a memory-mapped file. Each size runs in a
process of its own; the figure is the largest memory that no file backs, sampled twenty times a second.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from tests.benchmarks.teacher_cache import private_megabytes
from tests.tiny import byte_tokenizer, tiny_llama

LENGTH = 12


class Stream:
    """Rows that are made when they are read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row(i) for i in range(self.count))


def row(i: int) -> dict[str, Any]:
    """Return tokenized row ``i``, unlike the others."""
    return {"input_ids": [3 + (i >> 8 * place) % 256 for place in range(4)] + [3 + i % 250] * (LENGTH - 4)}


def measure(examples: int, kind: str, k: int, report: Any) -> None:
    """Capture ``examples`` rows and send (megabytes at the start, at most, seconds)."""
    torch.set_num_threads(1)
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, private_megabytes())

    teacher = LocalTeacher(tiny_llama(layers=1, hidden=16), tokenizer=byte_tokenizer(), license="apache-2.0")
    with tempfile.TemporaryDirectory() as directory:
        rows: Any = Stream(examples)
        if kind == "mapped":
            from datasets import Dataset

            file = Path(directory) / "rows.parquet"
            Dataset.from_generator(lambda: iter(Stream(examples)), cache_dir=f"{directory}/hf").to_parquet(file)
            rows = Dataset.from_parquet(str(file), cache_dir=f"{directory}/hf")
        # The first units warm allocators and imports up, so that only growth shows.
        capture([row(i) for i in range(2048)], teacher, f"{directory}/warm", targets=TopK(k), progress=False)
        before, start = private_megabytes(), time.perf_counter()
        watcher = threading.Thread(target=watch)
        watcher.start()
        capture(rows, teacher, f"{directory}/c", targets=TopK(k), progress=False)
        stop.set()
        watcher.join()
    report.send((before, peak, time.perf_counter() - start))


def main() -> None:
    """Print a line a size and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--k", type=int, default=16)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for kind in ("stream", "mapped"):
        for examples in arguments.examples:
            mine, theirs = context.Pipe()
            process = context.Process(target=measure, args=(examples, kind, arguments.k, theirs))
            process.start()
            theirs.close()
            before, peak, seconds = mine.recv()
            process.join()
            print(f"{kind}, {examples} examples: {before} MB before, {peak} MB at most, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
