"""Axolotl itself trains with the plugin, as `axolotl train` does. `make test-axolotl` has an environment for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

from datasets import Dataset

from kd_plugin import LocalTeacher, TeacherCache, capture
from kd_plugin.lineage import verify

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "integrations" / "axolotl"
ROWS = [{"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}."} for i in range(8)]
SMALL = {
    "sequence_len": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "save_steps": 2,
    "bf16": False, "fp16": False, "tf32": False, "logging_steps": 1, "dataset_num_proc": 1,
    "strict": False, "use_wandb": False, "save_only_model": False,
}  # fmt: skip


def train(tmp_path, configuration):
    """Run the command as a person does, and return what it logged and printed."""
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(configuration))
    told = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(path)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **told}, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (state,) = Path(configuration["output_dir"]).glob("checkpoint-2/trainer_state.json")
    return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry], done


def example(name, student_dir, tmp_path, **under):
    """An example as it stands, with the test's own models, and few steps."""
    found = yaml.safe_load((EXAMPLES / name).read_text())
    found["kd_plugin"] |= under
    return {**found, **SMALL, "base_model": str(student_dir), "output_dir": str(tmp_path / "out")}


def asked(tmp_path, configuration):
    """The configuration with two questions that are asked at each step, and nothing held out."""
    rows = tmp_path / "own.jsonl"
    Dataset.from_list([{"prompt": row["prompt"], "answer": row["completion"].strip()} for row in ROWS[:2]]).to_json(
        rows
    )
    own = {"rows": str(rows), "verify": "exact", "completions": 1, "max_new_tokens": 4}
    configuration["kd_plugin"] |= {"eval_tasks": {"tasks": {"own": own}}}
    return configuration | {"eval_steps": 1}


def measured(configuration):
    """At which steps the questions were answered; the result is in the lineage of the checkpoint of the last."""
    place = Path(configuration["output_dir"]) / "checkpoint-2"
    record = json.loads((place / "lineage.json").read_text())
    assert record["evaluation"]["own"]["answers"] == 1
    assert record["evaluation"]["own"]["pass@1"]["questions"] == 2
    state = json.loads((place / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "eval_own_accuracy" in entry]
    assert all(0 <= entry["eval_own_accuracy"] <= 1 for entry in entries)
    return [entry["step"] for entry in entries]


def kinds_of(directory):
    assert verify(directory).exit_code == 0, verify(directory).problems
    record = json.loads((directory / "lineage.json").read_text())
    return {edge["kind"] for edge in record["edges"]}


@pytest.fixture(scope="module")
def cache(teacher_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "cache"
    capture(ROWS, LocalTeacher(str(teacher_dir), dtype="float32"), directory, progress=False)
    return directory


def test_offline_kd_trains_on_the_rows_of_its_cache(student_dir, cache, tmp_path):
    configuration = asked(tmp_path, example("offline.yaml", student_dir, tmp_path, teacher_cache=str(cache)))
    configuration |= {"load_best_model_at_end": True, "metric_for_best_model": "own_accuracy", "save_steps": 1}
    logged, _ = train(tmp_path, configuration)
    assert len(logged) == 2 and all(0 < entry["loss"] < 20 for entry in logged)
    assert measured(configuration) == [0, 1, 2]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] and state["best_metric"] == 0
    for directory in (tmp_path / "out" / "checkpoint-2", tmp_path / "out"):
        assert "distilled" in " ".join(kinds_of(directory))


def test_the_loss_is_that_of_the_cache_and_not_cross_entropy(student_dir, cache, tmp_path):
    losses = []
    for weights in ({"kd_weight": 1.0, "ce_weight": 0.0}, {"kd_weight": 0.0, "ce_weight": 1.0}):
        own = tmp_path / str(len(losses))
        own.mkdir()
        configuration = example("offline.yaml", student_dir, own, teacher_cache=str(cache), offline=weights)
        losses.append(train(own, configuration)[0][0]["loss"])
    assert abs(losses[0] - losses[1]) > 0.05


def test_rows_that_axolotl_tokenizes_are_joined_to_the_cache(student_dir, cache, tmp_path):
    rows = TeacherCache(cache).dataset()
    labels = [
        [token if mask else -100 for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True)]
        for row in rows
    ]
    ids = [row["input_ids"] for row in rows]
    mask = [[1] * len(one) for one in ids]
    Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": mask}).to_json(tmp_path / "rows.jsonl")
    configuration = example("offline.yaml", student_dir, tmp_path, teacher_cache=str(cache))
    configuration["datasets"] = [{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": ""}]
    configuration["dataset_prepared_path"] = str(tmp_path / "prepared")
    logged, _ = train(tmp_path, configuration)
    assert len(logged) == 2


def test_a_panel_trains_on_policy(student_dir, teacher_dir, other_teacher_dir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    Dataset.from_list(
        [{"prompt": row["prompt"], "teacher_id": ("math", "code")[i % 2]} for i, row in enumerate(ROWS)]
    ).to_json(prompts)
    panel = {
        "teacher_models": {"math": str(teacher_dir), "code": str(other_teacher_dir)},
        "divergence": "reverse_kl",
        "max_completion_length": 8,
    }
    configuration = asked(tmp_path, example("panel.yaml", student_dir, tmp_path, prompts=str(prompts), panel=panel))
    logged, _ = train(tmp_path, configuration)
    assert measured(configuration) == [0, 1, 2]
    assert len(logged) == 2 and all(entry["loss"] > 0 for entry in logged)
    assert kinds_of(tmp_path / "out")


def test_lineage_and_evaluation_alone_follow_a_run_that_is_not_distilled(student_dir, tmp_path):
    Dataset.from_list([{"text": f"{row['prompt']}{row['completion']}"} for row in ROWS]).to_json(tmp_path / "t.jsonl")
    configuration = {
        **SMALL,
        "base_model": str(student_dir),
        "plugins": ["kd_plugin.axolotl.KDPlugin"],
        "kd_plugin": {"lineage": {"use": {"distribute": True}}},
        "datasets": [{"path": str(tmp_path / "t.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "optimizer": "adamw_torch",
        "learning_rate": 1e-4,
        "output_dir": str(tmp_path / "out"),
    }
    train(tmp_path, asked(tmp_path, configuration))
    assert measured(configuration) == [0, 1, 2]
    for directory in (tmp_path / "out" / "checkpoint-2", tmp_path / "out"):
        assert kinds_of(directory)
