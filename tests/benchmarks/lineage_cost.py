"""What lineage costs: hashing weights with 1 worker and with all cores, and writing everything beside a checkpoint.

Run: python -m tests.benchmarks.lineage_cost [--gib 2]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from kd_plugin.lineage import RunLineage, Source, verify
from kd_plugin.lineage.hashing import subjects

_SHARDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the weights")
    size = parser.parse_args().gib
    with tempfile.TemporaryDirectory() as place:
        student, directory = Path(place, "student"), Path(place, "checkpoint-1")
        student.mkdir()
        directory.mkdir()
        (student / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        block = os.urandom(1 << 20)
        for shard in range(_SHARDS):
            with (directory / f"model-{shard}.safetensors").open("wb") as file:
                for _ in range(int(size * 1024 / _SHARDS)):
                    file.write(block)
        cores = os.cpu_count() or 1
        for workers in (1, cores):
            begin, burnt = time.perf_counter(), time.process_time()
            subjects(directory, workers=workers)
            seconds, cpu = time.perf_counter() - begin, time.process_time() - burnt
            print(
                f"hash {size:g} GiB, {workers} worker(s): {seconds:.2f} s, {size / seconds:.2f} GiB/s, {cpu:.2f} s CPU"
            )
        begin = time.perf_counter()
        run = RunLineage(method="sft", student=Source("student", ref=str(student)))
        run.require_trainable()
        print(f"gate: {1000 * (time.perf_counter() - begin):.0f} ms")
        begin = time.perf_counter()
        run.write(directory, step=1)
        print(f"write beside {size:g} GiB: {time.perf_counter() - begin:.2f} s")
        begin = time.perf_counter()
        assert verify(directory).exit_code == 0
        print(f"verify: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
