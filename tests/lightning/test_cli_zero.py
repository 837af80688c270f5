"""The DeepSpeed file that ships, laid over the file of each method, trains on two CPU ranks."""

import json

import pytest
import torch

from kd_plugin.lineage import verify
from tests.lightning.launch import ROOT, run_ranks

pytestmark = pytest.mark.zero
FILES = ROOT / "integrations" / "lightning"
# What a CPU asks for: DeepSpeedStrategy itself insists on a GPU, see tests/lightning/ranks.py
ON_CPU = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.precision", "32-true",
    "--trainer.strategy.class_path", "tests.lightning.ranks.DeepSpeedOnCPU",
    "--trainer.strategy.init_args.process_group_backend", "gloo",
]  # fmt: skip
SMALL = [
    "--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.accumulate_grad_batches", "1", "--data.batch_size", "2",
    "--data.validation_rows", "4", "--trainer.num_sanity_val_steps", "0", "--trainer.val_check_interval", "2",
]  # fmt: skip


@pytest.mark.parametrize("method", ["offline", "panel"])
def test_the_zero_file_trains(method, tmp_path, untied_student_dir, teacher_dir, other_teacher_dir, cache):
    options = ["--model.model", untied_student_dir, "--trainer.default_root_dir", tmp_path]
    if method == "offline":
        options += ["--data.cache", cache.path, "--trainer.callbacks.init_args.dirpath", tmp_path]
    else:
        rows = [{"prompt": f"{i}?", "teacher_id": "math" if i % 3 else "general", "answer": "7"} for i in range(12)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        teachers = json.dumps({"math": teacher_dir, "general": other_teacher_dir})
        options += ["--model.teacher_models", teachers, "--model.max_completion_length", "4"]
        options += ["--data.prompts", tmp_path / "prompts.jsonl", "--data.samples", tmp_path / "prompts.jsonl"]
        options += ["--data.sample_rows", "2", "--model.sample_length", "2"]
    files = ["--config", FILES / f"{method}.yaml", "--config", FILES / "zero3.yaml"]
    run_ranks("kd_plugin.lightning", ["fit", *files, *SMALL, *ON_CPU, *options], 2)
    saved = [path for path in tmp_path.rglob("*.ckpt") if path.is_dir()]
    assert saved and all(verify(path).exit_code == 0 for path in saved)
    state = torch.load(next(saved[0].rglob("*model_states.pt")), weights_only=False)
    assert state["ds_config"]["zero_optimization"]["stage"] == 3 and state["global_step"] == 2
