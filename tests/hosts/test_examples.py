"""Every example and every file of integrations/ runs, for two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.cli.main import main
from kd_plugin.lineage import verify
from kd_plugin.teachers import LocalTeacher

ROOT = Path(__file__).parents[2]
SMALL = ["--max_steps", "2", "--bf16", "false", "--use_cpu", "true", "--save_strategy", "no", "--report_to", "none",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_length", "32",
         "--max_completion_length", "4"]  # fmt: skip


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(script, *options):
    command = [sys.executable, str(ROOT / "examples" / script), *options, "--max_steps", "2", "--no-bf16"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_offline_kd(tmp_path, student_dir, teacher_dir):
    rows = lines(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(16)])
    options = ["--teacher", teacher_dir, "--student", student_dir, "--rows", rows, "--output_dir", str(tmp_path / "o")]
    assert f"{tmp_path / 'o' / 'student'}: good" in run("offline_kd.py", *options)


def test_teacher_panel(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    rows = [{"prompt": f"{i}?", "teacher_id": ("math", "general")[i % 2]} for i in range(16)]
    options = ["--student", student_dir, "--math", teacher_dir, "--general", other_teacher_dir]
    options += ["--prompts", lines(tmp_path / "p.jsonl", rows), "--output_dir", str(tmp_path / "o")]
    assert f"{tmp_path / 'o'}: good" in run("teacher_panel.py", *options, "--max_completion_length", "4")


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_yaml(name, tmp_path, student_dir, teacher_dir, other_teacher_dir):
    content = yaml.safe_load((ROOT / "integrations" / "trl" / f"{name}.yaml").read_text())
    content["output_dir"] = str(tmp_path / "out")
    small = SMALL[:-2] if name == "offline" else SMALL[:-4] + SMALL[-2:]
    if name == "offline":
        rows = Dataset.from_list([{"prompt": f"{i}?", "completion": f" {i}"} for i in range(16)])
        cache = capture(rows, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)
        small = [*small, "--teacher_cache", str(cache.path)]
    else:
        content["teacher_models"] = {"math": teacher_dir, "general": other_teacher_dir}
        rows = [{"prompt": f"{i}?", "teacher_id": ("math", "general")[i % 2]} for i in range(16)]
        small = [*small, "--dataset_name", lines(tmp_path / "p.jsonl", rows)]
    config = tmp_path / f"{name}.yaml"
    config.write_text(yaml.safe_dump(content))
    assert main([name, "--config", str(config), "--model_name_or_path", student_dir, *small]) == 0
    assert verify(tmp_path / "out").exit_code == 0


def test_every_example_and_integration_is_run_by_some_test():
    tested = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    folders = [ROOT / "examples", ROOT / "integrations" / "trl", ROOT / "integrations" / "lightning"]
    for path in [path for folder in folders for path in folder.glob("*")]:
        assert path.stem in tested, f"{path} has no test"
