"""How small a teacher's targets can be, and what gradient a real student still gets from them.

python -m tests.benchmarks.fidelity --model DIR

DIR is SmolLM2-135M-Instruct, such as `kd-plugin demo` leaves in its models directory. The student is the one of 96M
parameters that keeps 19 of its 30 layers, or the directory that --student names. Exit code 1 where a limit is missed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing.fidelity import SETTINGS, fidelity
from kd_plugin.cli.cache import plot, table
from kd_plugin.demo.model import PreparedTeacher, cut_student
from kd_plugin.teachers import LocalTeacher
from tests.benchmarks.prose import paragraphs

LAYERS = [*range(0, 9), *range(20, 30)]  # 19 of 30
POSITIONS = 1000
TOKENS_A_SEQUENCE = 60  # of a paragraph, on average, by which their number is chosen
LIMITS = {TopK(64): (190, 0.0), Sampled(50): (60, 0.995)}  # bytes a position at most, cosine at least


def student_of(model: str, directory: Path) -> Path:
    """Cut the student from the teacher, unless that has been done."""
    if not directory.exists():
        teacher = PreparedTeacher(model, "HuggingFaceTB/SmolLM2-135M-Instruct", "a local directory")
        cut_student(teacher, directory, LAYERS, "apache-2.0", {})
    return directory


def main() -> int:
    """Measure, print, and hold the figures against the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--student")
    parser.add_argument("--positions", type=int, default=POSITIONS)
    parser.add_argument("--output", type=Path, help="directory for fidelity.json and fidelity.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"text": text} for text in paragraphs()]
    with tempfile.TemporaryDirectory() as scratch:
        student = arguments.student or student_of(arguments.model, Path(scratch) / "student")
        found = fidelity(
            rows,
            LocalTeacher(arguments.model, license="apache-2.0", dtype="float32"),
            lambda: AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
            settings=SETTINGS,
            sequences=-(-arguments.positions // TOKENS_A_SEQUENCE),
            batch_tokens=1024,
        )
    print(table(found))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "fidelity.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
        plot(found, arguments.output / "fidelity.png")
    missed = 0
    for measured in found.measurements:
        if measured.targets in LIMITS:
            most, least = LIMITS[measured.targets]
            holds = measured.bytes <= most and measured.cosine >= least
            missed += not holds
            verdict = "held" if holds else "MISSED"
            print(f"{measured.name}: at most {most} bytes and a cosine of at least {least:g}: {verdict}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
