"""What a normal run says on stderr: at most two warnings of ours, and no noise of other libraries."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BARS = r"\d+%\||it/s|s/it|examples/s"
INFORMS = r"^(capture: \d+/\d+ rows|cache: aligned|The student and its lineage are in|=== )"
COMMANDS = ("capture", "offline", "panel")


@pytest.fixture(scope="module")
def said(tmp_path_factory, student_dir, teacher_dir):
    """Lines on stderr by command, as a user of the defaults reads them; all in one process, for its imports."""
    place = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"model_name_or_path": str(student_dir), "max_steps": 2, "per_device_train_batch_size": 2}
    panel = {"teachers": {"one": {"model": str(teacher_dir)}}}
    for name, config in {
        "capture": {"dataset": "rows.jsonl", "teacher": str(teacher_dir), "output_dir": "cache"},
        "offline": {**few, "teacher_cache": "cache", "output_dir": "offline"},
        "panel": {
            **few,
            "dataset_name": "rows.jsonl",
            "output_dir": "panel",
            "max_completion_length": 4,
            "panel": panel,
        },
    }.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    code = "import sys; from kd_plugin.cli.main import main\n"
    code += f"for name in {COMMANDS}:\n"
    code += "    print(f'=== {name}', file=sys.stderr, flush=True)\n"
    code += "    assert main([name, '--config', f'{name}.yaml']) == 0"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    _, *parts = re.split(r"^=== ", done.stderr.replace("\r", "\n"), flags=re.M)
    assert len(parts) == len(COMMANDS)
    return {part.split("\n")[0]: part.split("\n")[1:] for part in parts}


@pytest.mark.parametrize("command", COMMANDS)
def test_at_most_two_warnings(said, command):
    lines = [line.strip() for line in said[command]]
    left = [line for line in lines if line and not re.search(BARS, line) and not re.search(INFORMS, line)]
    assert len(left) <= 2, left


def test_what_is_counted_is_there(said):
    """The count above would be of nothing if stderr were not that of the commands."""
    assert any("no terms were declared" in line for line in said["offline"])
    assert any("The student and its lineage are in" in line for line in said["panel"])
