"""The files of integrations/ that are about captures are run, with tiny models in the place of the names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kd_plugin.cache import Sampled, TeacherCache
from kd_plugin.cli.main import main

ROOT = Path(__file__).parents[2] / "integrations"


@pytest.fixture
def config(teacher_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load((ROOT / "capture" / "verified.yaml").read_text())
    content |= {
        "dataset": str(tmp_path / "prompts.jsonl"),
        "teacher": teacher_dir,
        "output_dir": str(tmp_path / "c"),
        "max_new_tokens": 6,
        "keep_unfinished": True,
        "dtype": "float32",
    }
    path = tmp_path / "verified.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_verified(config, tmp_path, capsys):
    """A random teacher is never right: the one error, with the reasons counted."""
    pytest.importorskip("math_verify")
    assert main(["capture", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert "Nothing is left of 6 rows: every completion was dropped (" in error and "no answer" in error
    kept = ["--filter=tests.core.cache_filters:short", "--output_dir", str(tmp_path / "d"), "--max_new_tokens=4"]
    assert main(["capture", "--config", str(config), *kept]) == 0
    assert TeacherCache(tmp_path / "d").manifest.settings.targets == Sampled(50)


@pytest.mark.slow
def test_capture_array(config, tmp_path):
    """Two tasks of an array over one directory."""
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", 'exec "$@"'), ("kd-plugin", f'exec {sys.executable} -m kd_plugin "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = [str(ROOT / "slurm" / "capture_array.sh"), str(config)]
    kept = ["--filter=tests.core.cache_filters:short", "--shard_rows=2", "--max_new_tokens=4"]
    running = []
    for task in "01":
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT.parent),
            "SLURM_ARRAY_TASK_ID": task,
        }
        running.append(subprocess.Popen(["bash", *script, *kept], env=environment, stderr=subprocess.PIPE))
    for one in running:
        _, error = one.communicate(timeout=300)
        assert one.returncode == 0, error.decode()[-2000:]
    TeacherCache(tmp_path / "c").verify()


def test_every_file_is_run_here():
    tested = Path(__file__).read_text()
    for path in [*(ROOT / "capture").glob("*"), *(ROOT / "slurm").glob("capture*")]:
        assert path.stem in tested, f"{path} has no test"
