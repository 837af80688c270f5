"""What the doctor asks of the servers that a run's YAML names."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kd_plugin.launch.doctor import LaunchSettings, own_problems
from kd_plugin.launch.servers import server_problems
from tests.fake_vllm import Behaviour, fake_vllm

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def far(teacher_dir, tokenizer):
    """A server that pools, and one that generates; both may be changed."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    with (
        fake_vllm(model, tokenizer, Behaviour(runner="pooling")) as pooler,
        fake_vllm(model, tokenizer, Behaviour(version="0.32.0")) as engine,
    ):
        yield pooler, engine


def written(tmp_path, far, teacher_dir, sync="reload", **teacher):
    (pooler, _), (engine, _) = far
    told = {"kind": "server", "signal": "hidden", "url": pooler, "repo": teacher_dir, "max_retries": 0, **teacher}
    content = {
        "panel": {"teachers": {"large": told}},
        "rollout_engine": {"kind": "vllm", "url": engine, "sync": sync},
        "output_dir": str(tmp_path),
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "train.yaml"


def test_servers_that_are_well_are_measured(far, teacher_dir, tmp_path, caplog):
    config = written(tmp_path, far, teacher_dir)
    problems, (note,) = server_problems(config)
    assert problems == [] and "GB/s of hidden states" in note
    assert own_problems(LaunchSettings(output_dir=str(tmp_path), training=str(config))) == []
    assert "GB/s of hidden states" in caplog.text


@pytest.mark.parametrize(
    ("which", "change", "sync", "message"),
    [
        (0, {"pooler": {"task": "token_embed"}}, "reload", "teacher 'large': .* normalizes its hidden states"),
        (0, {"dtype": "bfloat16"}, "reload", "teacher 'large': .* computes in bfloat16"),
        (
            1,
            {"takes_weights": False},
            "reload",
            "takes no weights by sync: reload; start it with VLLM_SERVER_DEV_MODE=1",
        ),
        (1, {"takes_adapters": False}, "adapter", "takes no weights by sync: adapter; start it with .*--enable-lora"),
        (1, {"version": "0.31.2"}, "reload", "is vLLM 0.31.2; 0.32 or later is needed"),
        (1, {"failures": [0, 0]}, "reload", "does not answer as vLLM does"),
    ],
)
def test_each_fault_is_named_with_its_way_out(which, change, sync, message, far, teacher_dir, tmp_path):
    for name, value in change.items():
        setattr(far[which][1], name, value)
    problems, _ = server_problems(written(tmp_path, far, teacher_dir, sync))
    assert len(problems) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems[0])


def test_a_slow_server_and_a_wrong_block_are_problems(far, teacher_dir, tmp_path):
    problems, _ = server_problems(written(tmp_path, far, teacher_dir), least_rate=1e15)
    assert len(problems) == 1 and "1e+06 are needed" in problems[0]
    problems, notes = server_problems(written(tmp_path, far, teacher_dir, sync="relod"))
    assert "Did you mean 'reload'" in problems[0] and notes == []
