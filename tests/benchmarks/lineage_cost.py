"""What lineage costs: hashing large weights on one core and on all, a large parent, and its share of a short run.

Run: python -m tests.benchmarks.lineage_cost [--gib 10] [--rounds 3] [--steps 100] [--models DIR]

The parent is the checkpoint just written; a process of its own starts a run from it twice, as two trainers would. The
share is time inside lineage (gate, hashing, writing) over the time of the whole run, both of one run of the demo's
model that saves every ``--steps`` steps; ``--steps 0`` leaves it out.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kd_plugin.lineage import RunLineage, Source, verify
from kd_plugin.lineage.hashing import subjects

_SHARDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=10.0, help="size of the weights that are hashed")
    parser.add_argument("--rounds", type=int, default=3, help="times that each number of workers is measured")
    parser.add_argument("--steps", type=int, default=100, help="steps of the demo's model, with a save after the last")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step; 16 is the demo's")
    parser.add_argument("--models", default="kd-plugin-demo/models", help="where the demo's teacher is or goes")
    parser.add_argument("--place", default=None, help="directory for the files; needs --gib of space")
    parser.add_argument("--parent", default=None, help=argparse.SUPPRESS)  # of the process that starts from it
    chosen = parser.parse_args()
    if chosen.parent:
        start_from(chosen.parent)
        return
    with tempfile.TemporaryDirectory(dir=chosen.place) as place:
        hash_large(Path(place), chosen.gib, chosen.rounds)
    if chosen.steps:
        with tempfile.TemporaryDirectory(dir=chosen.place) as place:
            share_of_a_run(Path(place), chosen.steps, chosen.batch, Path(chosen.models))


def hash_large(place: Path, gib: float, rounds: int) -> None:
    """Hash with one worker and with all cores, in turns; then time gate, writing and verifying."""
    student, directory = place / "student", place / "checkpoint-1"
    student.mkdir()
    directory.mkdir()
    (student / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    block = os.urandom(1 << 20)
    for shard in range(_SHARDS):
        with (directory / f"model-{shard}.safetensors").open("wb") as file:
            for _ in range(int(gib * 1024 / _SHARDS)):
                file.write(block)
    cores = len(os.sched_getaffinity(0))
    seconds: dict[int, list[float]] = {1: [], cores: []}
    busy: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(rounds):
        for workers in seconds:
            begin, burnt = time.perf_counter(), time.process_time()
            subjects(directory, workers=workers)
            seconds[workers].append(time.perf_counter() - begin)
            busy[workers].append((time.process_time() - burnt) / seconds[workers][-1])
    for workers, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"hash {gib:g} GiB, {workers} worker(s): {middle:.2f} s, {gib / middle:.2f} GiB/s, "
            f"{statistics.median(busy[workers]):.2f} of {cores} cores busy"
        )
    begin = time.perf_counter()
    run = RunLineage(method="sft", student=Source("student", ref=str(student)))
    run.require_trainable()
    print(f"gate: {1000 * (time.perf_counter() - begin):.0f} ms")
    begin = time.perf_counter()
    run.write(directory, step=1)
    print(f"write beside {gib:g} GiB: {time.perf_counter() - begin:.2f} s")
    begin = time.perf_counter()
    assert verify(directory).exit_code == 0
    print(f"verify: {time.perf_counter() - begin:.2f} s")
    again = [sys.executable, "-m", "tests.benchmarks.lineage_cost", "--parent", str(directory)]
    print(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout, end="")


def start_from(parent: str) -> None:
    """Start two runs from a parent with a record, and time the gate and what training then waits for."""
    for which in ("first", "second"):
        begin = time.perf_counter()
        run = RunLineage(method="sft", student=Source("student", ref=parent))
        run.require_trainable()
        gate = time.perf_counter() - begin
        run.settle()
        waited = time.perf_counter() - begin - gate
        print(
            f"{which} run from the parent: gate {1000 * gate:.0f} ms, then {waited:.2f} s until its digests are known"
        )


def share_of_a_run(place: Path, steps: int, batch: int, models: Path) -> None:
    """Fine-tune the demo's student and print lineage's share of the time."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from kd_plugin.demo.model import cut_student, prepare_teacher
    from kd_plugin.demo.prompts import MATH, questions
    from kd_plugin.demo.state import DemoConfig
    from kd_plugin.trl import LicenseLineageCallback

    class Timed(LicenseLineageCallback):
        spent = 0.0

    def timed(method):
        def call(self, *args, **kwargs):
            begin = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                Timed.spent += time.perf_counter() - begin

        return call

    for name in ("on_init_end", "on_train_begin", "on_step_end", "on_save", "on_train_end", "save_begins", "save_ends"):
        setattr(Timed, name, timed(getattr(LicenseLineageCallback, name)))

    cut_student(prepare_teacher(models), place / "student", DemoConfig().kept_layers(), None, {})
    asked = questions("train", MATH, DemoConfig().train_prompts)
    rows = [{"prompt": q.prompt, "completion": [{"role": "assistant", "content": q.answer}]} for q in asked]
    begin = time.perf_counter()
    trainer = SFTTrainer(
        model=str(place / "student"),
        args=SFTConfig(
            output_dir=str(place / "out"),
            max_steps=steps,
            save_strategy="steps",
            save_steps=steps,
            per_device_train_batch_size=batch,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Timed()],
    )
    trainer.train()
    whole = time.perf_counter() - begin
    assert verify(place / "out" / f"checkpoint-{steps}").exit_code == 0
    print(
        f"demo model, {steps} steps of {batch} rows, saved every {steps}: {whole:.1f} s, of which lineage "
        f"{Timed.spent:.2f} s: {100 * Timed.spent / whole:.2f}%"
    )


if __name__ == "__main__":
    main()
