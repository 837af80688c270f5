"""Capture a teacher once, then fit a student to what it said.

    python examples/offline_kd.py --teacher TEACHER --student STUDENT --rows rows.jsonl --output_dir out

`rows.jsonl` has a `prompt` and a `completion` in each line. Expected: a progress bar for the capture, the loss every
step, `out/cache` and `out/student`, and at the end `out/student: good`. Run it again after an interruption: the
capture goes on where it was.
"""

import argparse

from datasets import load_dataset

from kd_plugin import LocalTeacher, capture
from kd_plugin.lineage import verify
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", required=True, help="path or hub id")
parser.add_argument("--student", required=True, help="path or hub id; the teacher's tokenizer")
parser.add_argument("--rows", required=True, help="JSON lines with prompt and completion")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=-1)
parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
options = parser.parse_args()

rows = load_dataset("json", data_files=options.rows, split="train")
cache = capture(rows, LocalTeacher(options.teacher), f"{options.output_dir}/cache")

student_dir = f"{options.output_dir}/student"
trainer = OfflineKDTrainer(
    model=options.student,
    args=OfflineKDConfig(output_dir=student_dir, max_steps=options.max_steps, logging_steps=1, bf16=options.bf16),
    train_dataset=rows,
    teacher_cache=cache,
)
trainer.train()
trainer.save_model()

report = verify(student_dir)
print(f"{student_dir}: {'good' if report.exit_code == 0 else report.problems}")
