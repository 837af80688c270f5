"""Whether the memory of offline training grows with the number of examples.

    python -m tests.benchmarks.training_memory                       # 10,000 and 1,000,000 examples
    python -m tests.benchmarks.training_memory --examples 1000 4000  # quick; checks that it runs

Each size is a synthetic cache (12 tokens an example, 4 listed tokens a position) and a process of its own, in which
OfflineKDTrainer trains a tiny student for some steps on the cache's rows. `anonymous` is memory that no file backs,
at its highest (sampled at each step), less what it was before the cache was opened.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import TrainerCallback

from kd_plugin.cache import TeacherCache
from kd_plugin.lineage import Source, outputs_record
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from kd_plugin.vocab import Vocabulary
from tests.benchmarks.teacher_cache import private_megabytes, synthetic
from tests.hosts.runs import settings
from tests.tiny import byte_tokenizer, tiny_llama

LENGTH, LISTED = 12, 4


class Highest(TrainerCallback):
    """Keeps the highest private memory seen at the ends of steps."""

    def __init__(self) -> None:
        self.megabytes = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.megabytes = max(self.megabytes, private_megabytes())


OWN = {"student": {"license": "own"}, "teachers": {"synthetic": {"license": "own"}}}


def train(directory: Path, examples: int, steps: int) -> dict[str, float]:
    """Fill, open and train; return seconds and MB."""
    tokenizer = byte_tokenizer()
    lineage = outputs_record(Source("synthetic", license="own"))
    synthetic(directory / "cache", examples, LENGTH, LISTED, Vocabulary.from_tokenizer(tokenizer), lineage)
    model, highest = tiny_llama(), Highest()
    before, begun = private_megabytes(), time.perf_counter()
    cache = TeacherCache(directory / "cache")
    cache.dataset()
    opened = time.perf_counter() - begun
    trainer = OfflineKDTrainer(
        model=model,
        args=OfflineKDConfig(**settings(directory / "run", max_steps=steps, lineage=OWN, logging_steps=1000)),
        teacher_cache=cache,
        processing_class=tokenizer,
        callbacks=[highest],
    )
    ready = time.perf_counter() - begun
    trainer.train()
    return {"opened": opened, "ready": ready, "anonymous": highest.megabytes - before}


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(train(Path(directory), arguments.examples[0], arguments.steps)))
        return
    print("| examples | mapped and opened in s | ready to train in s | anonymous MB |\n|---|---|---|---|")
    for examples in arguments.examples:
        script = [sys.executable, "-m", "tests.benchmarks.training_memory", "--here", "--examples", str(examples)]
        done = subprocess.run(
            [*script, "--steps", str(arguments.steps)], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        found = json.loads(done)
        print(f"| {examples:,} | {found['opened']:.1f} | {found['ready']:.1f} | {found['anonymous']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
