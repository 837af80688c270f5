"""Let two teachers score the student's responses, each in its domain.

    python examples/teacher_panel.py --student STUDENT --math MATH_TEACHER --general TEACHER \
        --prompts prompts.jsonl --output_dir out

`prompts.jsonl` has a `prompt` and a `teacher_id`, `math` or `general`, in each line. Expected: the loss and each
teacher's divergence every step, the student in `out`, and at the end `out: good`.
"""

import argparse

from datasets import load_dataset

from kd_plugin.lineage import verify
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", required=True, help="path or hub id")
parser.add_argument("--math", required=True, help="path or hub id of the math teacher")
parser.add_argument("--general", required=True, help="path or hub id of the general teacher")
parser.add_argument("--prompts", required=True, help="JSON lines with prompt and teacher_id")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=-1)
parser.add_argument("--max_completion_length", type=int, default=256)
parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
options = parser.parse_args()

trainer = TeacherPanelTrainer(
    model=options.student,
    teacher_models={"math": options.math, "general": options.general},
    args=TeacherPanelConfig(
        output_dir=options.output_dir,
        divergence="reverse_kl",
        max_steps=options.max_steps,
        max_completion_length=options.max_completion_length,
        logging_steps=1,
        bf16=options.bf16,
    ),
    train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
)
trainer.train()
trainer.save_model()

report = verify(options.output_dir)
print(f"{options.output_dir}: {'good' if report.exit_code == 0 else report.problems}")
