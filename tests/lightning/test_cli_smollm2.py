"""LightningCLI trains the real SmolLM2 from the files that ship, as commands that a user types."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.demo.model import prepare_teacher
from kd_plugin.lineage import verify
from kd_plugin.teachers import LocalTeacher
from tests.lightning.launch import ROOT

pytestmark = pytest.mark.slow
FILES = ROOT / "integrations" / "lightning"
# Two steps of two short rows in float32, since the files are made for GPUs; everything else is as it ships
SHORT = [
    "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision",
    "32-true", "--trainer.accumulate_grad_batches", "1", "--trainer.val_check_interval", "2", "--data.batch_size", "2",
    "--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0", "--data.validation_rows", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
SUMS = [(3, 4), (2, 5), (1, 6), (4, 4), (5, 3), (7, 2)]
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {a} plus {b}? Answer with a number."}],
        "completion": [{"role": "assistant", "content": f"{a + b}"}],
        "answer": str(a + b),
        "teacher_id": ("math", "general")[a % 2],
    }
    for a, b in SUMS
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """KD_SMOLLM2 names a prepared directory; else the demo's own preparation makes one."""
    given = os.environ.get("KD_SMOLLM2")
    return given or prepare_teacher(tmp_path_factory.mktemp("smollm2")).ref


def command(directory, *arguments, fails=False):
    """Run ``python -m kd_plugin.lightning``, and return the metrics that it logged, or what it said."""
    logs = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(directory / "logs")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "kd_plugin.lightning", *map(str, arguments), *logs],
        cwd=directory, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == (2 if fails else 0), done.stderr[-3000:]  # 2: the command line is wrong
    if fails:
        return done.stderr
    last = max(Path(directory).rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    found = {}
    with last.open() as file:
        for row in csv.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def fitted_and_validated(directory, method, options):
    """Fit, validate the checkpoint and the start, override a field, and mistype one."""
    files = ["--config", FILES / f"{method}.yaml"]
    fitted = command(directory, "fit", *files, *SHORT, *options, "--model.learning_rate", "1e-4")
    (checkpoint, *_) = sorted(directory.rglob("*.ckpt"))
    assert verify(checkpoint).exit_code == 0, verify(checkpoint).problems
    after = command(directory, "validate", *files, *SHORT, *options, "--ckpt_path", checkpoint)
    before = command(directory, "validate", *files, *SHORT, *options)
    assert after["val/divergence"] == pytest.approx(fitted["val/divergence"], rel=1e-3)
    assert before["val/divergence"] != pytest.approx(fitted["val/divergence"], rel=1e-3), "the options train"
    said = command(directory, "fit", *files, *SHORT, *options, "--model.learning_rat", "1e-4", fails=True)
    assert "unknown key '--model.learning_rat'. Did you mean 'learning_rate'?" in said
    return fitted, after


@pytest.fixture
def options(tmp_path, smollm2):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--model.model", smollm2, "--data.samples", tmp_path / "prompts.jsonl", "--data.sample_rows", "2",
            "--model.sample_length", "4", "--model.verify", "contains"]  # fmt: skip


def test_offline(tmp_path, smollm2, options):
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in ROWS]
    cache = capture(
        Dataset.from_list(rows), LocalTeacher(smollm2, dtype="float32"), tmp_path / "cache", targets=TopK(32),
        progress=False,
    )  # fmt: skip
    # Fitted to its own outputs a student has nothing to learn; the cross-entropy moves it all the same
    own = ["--data.cache", cache.path, "--model.ce_weight", "1.0"]
    fitted, after = fitted_and_validated(tmp_path, "offline", [*options, *own])
    assert {"val/divergence", "val/cross_entropy", "val/accuracy", "kd/divergence"} <= fitted.keys()
    assert 0 <= after["val/accuracy"] <= 1


def test_panel(tmp_path, smollm2, options):
    teachers = json.dumps({"math": smollm2, "general": smollm2})
    own = ["--model.teacher_models", teachers, "--data.prompts", tmp_path / "prompts.jsonl"]
    own += ["--model.max_completion_length", "4", "--model.ce_weight", "1.0", "--trainer.check_val_every_n_epoch", "1"]
    fitted, after = fitted_and_validated(tmp_path, "panel", [*options, *own])
    assert {"val/divergence", "val/rollout_accuracy", "val/accuracy", "kd/loss", "tokens/math"} <= fitted.keys()
    assert 0 <= after["val/rollout_accuracy"] <= 1
