"""Let a teacher that only writes correct what the student wrote.

    python examples/text_panel.py --student STUDENT --url http://localhost:8000 --teacher TEACHER \
        --prompts prompts.jsonl --output_dir out

The server is any with OpenAI's chat interface; TEACHER is the name of its model, whose terms are read by that name or
declared with `--license`. `prompts.jsonl` has a `prompt` and its `answer` in each line. The answer decides which
responses fall short, and which corrections are trained on. Expected: `text/right` and `text/accepted` every step, what
was said under `out/rounds`, the student in `out`, and at the end `out: good`.
"""

import argparse

from datasets import load_dataset

from kd_plugin.lineage import verify
from kd_plugin.panel import TeacherPanel
from kd_plugin.text import TextServerTeacher
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", required=True, help="path or hub id")
parser.add_argument("--url", required=True, help="address of the teacher's server")
parser.add_argument("--teacher", required=True, help="name of its model")
parser.add_argument("--license", help="of the model, where none can be discovered by its name")
parser.add_argument("--verifier", default="math_verify", help="what compares a response with the answer")
parser.add_argument("--prompts", required=True, help="JSON lines with prompt and answer")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=-1)
parser.add_argument("--max_completion_length", type=int, default=256)
parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
options = parser.parse_args()

teacher = TextServerTeacher(options.url, options.teacher, name="teacher", license=options.license)
text = CorrectionSettings(evaluate="verifier", verifier=options.verifier, keep_weight=1.0)
trainer = TeacherPanelTrainer(
    model=options.student,
    teacher_models=TeacherPanel({"teacher": teacher}, text=text),
    args=TeacherPanelConfig(
        output_dir=options.output_dir,
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
