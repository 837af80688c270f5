"""What a normal run of two ranks under DeepSpeed says: at most two warnings of ours, and no noise of DeepSpeed's."""

import json
import re
import subprocess

import pytest
import yaml

from tests.hosts.test_normal_run import BARS, INFORMS
from tests.zero.cluster import install, rank_environment
from tests.zero.ranks import free_port
from tests.zero.worker import deepspeed_config

pytestmark = pytest.mark.zero
LOGS = r"^\{'"  # what the trainer logs, which is what people want to see
# What is there on a CPU alone: DeepSpeed prints that it has compiled its exchange through shared memory
ON_CPU = r"^DeepSpeed \S+ built successfully$"


@pytest.mark.parametrize(("command", "stage"), [("panel", 2), ("panel", 3), ("offline", 2)])
def test_at_most_two_warnings(command, stage, cache, untied_student_dir, teacher_dir, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "zero.json").write_text(json.dumps(deepspeed_config(stage)))
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({
            "model_name_or_path": untied_student_dir, "output_dir": "out", "max_steps": 2, "bf16": False,
            "per_device_train_batch_size": 2, "deepspeed": "zero.json", "logging_steps": 1,
            "accelerator_config": {"use_configured_state": True},
            **({"teacher_cache": str(cache)} if command == "offline" else {
                "dataset_name": "rows.jsonl", "max_completion_length": 4, "panel": {"teachers": {"a": teacher_dir}},
            }),
        })
    )  # fmt: skip
    install(tmp_path / "bin")
    done = subprocess.run(
        ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "kd_plugin", command,
         "--config", "train.yaml"],
        env=rank_environment(tmp_path / "bin"), cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    said = (done.stdout + "\n" + done.stderr).replace("\r", "\n")
    lines = [line.strip() for line in said.splitlines()]
    assert sum(bool(re.search(LOGS, line)) for line in lines) >= 2, said  # what is counted below is what ranks print
    known = f"{BARS}|{INFORMS}|{LOGS}|{ON_CPU}"
    left = [line for line in lines if line and not re.search(known, line)]
    assert len(left) <= 2, "\n".join(left)
