"""LightningCLI from YAML alone, the example, and errors that name the near key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kd_plugin.errors import ConfigError
from kd_plugin.lightning.__main__ import KDCommand, main
from kd_plugin.lineage import verify

ROOT = Path(__file__).parents[2]
FILES = ROOT / "integrations" / "lightning"
SMALL = [
    "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--data.batch_size", "2",
    "--trainer.val_check_interval", "1", "--trainer.precision", "32-true", "--trainer.accumulate_grad_batches", "1",
    "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1",
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}?", "teacher_id": ("math", "general")[i % 2], "answer": "7"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_offline_from_yaml_alone(tmp_path, monkeypatch, student_dir, cache, prompts):
    monkeypatch.chdir(tmp_path)
    options = ["--model.model", student_dir, "--data.cache", str(cache.path), "--data.samples", prompts]
    options += ["--data.sample_rows", "2", "--data.validation_rows", "2", "--model.sample_length", "2"]
    config = ["--config", str(FILES / "offline.yaml"), *SMALL, *options]
    done = KDCommand(["fit", *config, "--trainer.default_root_dir", "out", "--model.learning_rate", "0.001"])
    assert done.model.hparams["learning_rate"] == 0.001 and done.trainer.global_step == 2
    logged = done.trainer.callback_metrics
    assert logged["val/divergence"] > 0 and logged["val/accuracy"] >= 0
    checkpoints = list(tmp_path.rglob("*.ckpt"))
    assert checkpoints and all(verify(path).exit_code == 0 for path in checkpoints)
    validated = KDCommand(["validate", *_without(config, "--trainer.max_steps")])
    assert validated.trainer.callback_metrics["val/divergence"] > logged["val/divergence"], "this one was not trained"


def _without(arguments, option):
    at = arguments.index(option)
    return arguments[:at] + arguments[at + 2 :]


def test_panel_from_yaml_alone(tmp_path, monkeypatch, student_dir, teacher_dir, other_teacher_dir, prompts):
    monkeypatch.chdir(tmp_path)
    teachers = json.dumps({"math": teacher_dir, "general": other_teacher_dir})
    options = ["--model.model", student_dir, "--model.teacher_models", teachers, "--data.prompts", prompts]
    options += ["--data.samples", prompts, "--model.max_completion_length", "3", "--model.sample_length", "2"]
    config = ["--config", str(FILES / "panel.yaml"), *SMALL, *options, "--data.validation_rows", "2"]
    done = KDCommand(["fit", *config])
    logged = done.trainer.callback_metrics
    assert done.trainer.global_step == 2 and "val/accuracy" in logged and logged["val/divergence"] > 0
    validated = KDCommand(["validate", *_without(config, "--trainer.max_steps")]).trainer.callback_metrics
    assert validated["val/divergence"] != logged["val/divergence"] and "val/rollout_accuracy" in validated
    assert all(verify(path).exit_code == 0 for path in tmp_path.rglob("*.ckpt"))


def test_the_zero_file_lies_over_the_others(student_dir, cache):
    config = yaml.safe_load((FILES / "zero3.yaml").read_text())
    strategy = config["trainer"]["strategy"]
    from lightning.pytorch.strategies import DeepSpeedStrategy

    built = DeepSpeedStrategy(**strategy["init_args"])
    assert strategy["class_path"].endswith("DeepSpeedStrategy") and built.zero_stage_3


def test_the_configuration_is_printed(capsys, student_dir):
    with pytest.raises(SystemExit) as ended:
        KDCommand(["fit", "--model", "OfflineKDModule", "--model.model", student_dir, "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["kd_weight"] == 1.0 and printed["data"]["validation_rows"] == 0


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("model", {"class_path": "OfflineKDModule", "init_args": {"learning_rat": 1}}, "Did you mean 'learning_rate'"),
        ("model", {"class_path": "OflineKDModule"}, "unknown model.class_path.*Did you mean 'OfflineKDModule'"),
        ("data", {"batchsize": 2}, "'data.batchsize'. Did you mean 'batch_size'"),
        ("trainer", {"max_stps": 2}, "'trainer.max_stps'. Did you mean 'max_steps'"),
        ("trainr", {}, "'trainr'. Did you mean 'trainer'"),
    ],
)  # fmt: skip
def test_a_wrong_key_names_the_near_one(where, change, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({where: change}))
    with pytest.raises(ConfigError, match=said):
        KDCommand(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    ("option", "said"),
    [("--data.cash", "'cache'"), ("--model.learning_rat", "'learning_rate'"), ("--trainer.max_step", "'max_steps'"),
     ("--modl", "'model'")],
)  # fmt: skip
def test_a_wrong_option_names_the_near_one(option, said, capsys):
    assert main(["fit", "--model", "OfflineKDModule", f"{option}=1"]) == 2
    assert f"Did you mean {said}" in capsys.readouterr().err


def test_files_that_are_missing_or_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        KDCommand(["fit", "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        KDCommand(["fit", "--config", str(tmp_path / "x.yaml")])


def test_the_example(tmp_path, student_dir, cache):
    options = ["--student", student_dir, "--cache", str(cache.path), "--output_dir", str(tmp_path), "--max_steps", "2"]
    command = [sys.executable, str(ROOT / "examples" / "lightning_callback.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{tmp_path}/student.ckpt: good" in done.stdout


@pytest.mark.parametrize("way", ["option", "file"])
def test_a_value_of_another_type_is_one_line(way, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  class_path: OfflineKDModule\n  init_args:\n    model: x\n    ce_weight: lots\n")
    option = ["--model", "OfflineKDModule", "--model.model", "x", "--model.ce_weight", "lots"]
    assert main(["fit", *(option if way == "option" else ["--config", str(file)])]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    place = "" if way == "option" else f"{file}, line 5: "
    assert (
        len(said) == 1 and said[0].startswith(f"error: {place}model") and "ce_weight: expected float, found" in said[0]
    )
