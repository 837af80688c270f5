"""What the doctor asks of the servers that a run's YAML names."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kd_plugin.cli.main import main
from kd_plugin.launch.doctor import LaunchSettings, own_problems, with_plan
from kd_plugin.launch.servers import server_problems
from kd_plugin.teachers.hidden import states as hidden_states
from tests.fake_vllm import Behaviour, fake_vllm
from tests.tiny import save_tiny

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


def written(tmp_path, far, teacher_dir, sync="reload", student=None, **teacher):
    (pooler, _), (engine, _) = far
    told = {"kind": "server", "signal": "hidden", "url": pooler, "repo": teacher_dir, "max_retries": 0, **teacher}
    content = {
        "panel": {"teachers": {"large": told}},
        "rollout_engine": {"kind": "vllm", "url": engine, "sync": sync},
        "output_dir": str(tmp_path),
        "model_name_or_path": student or teacher_dir,
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


def test_a_plan_says_how_many_bytes_a_second_a_step_needs(tmp_path, capsys):
    """4.2 GB of R1's hidden states in the seconds that the plan has for scoring and sending them."""
    asked = ["plan", "--student", "Qwen/Qwen2.5-32B", "--teachers", "[deepseek-ai/DeepSeek-R1:server]", "--nodes", "1"]
    beside = ["--engine_gpus", "8", "--server_gpus", "16", "--server_active", "37", "--server_width", "7168"]
    assert main([*asked, *beside, "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    settings = with_plan(LaunchSettings(plan=str(tmp_path / "plan.json")))
    seconds = 2 * 37e9 * 64 * 4608 / (16 * 989e12 * 0.4) + 64 * 4608 * 7168 * 2 / 3e9
    assert settings.server_rate == pytest.approx(64 * 4608 * 7168 * 2 / seconds / 1e9, rel=1e-6)
    assert with_plan(LaunchSettings(plan=str(tmp_path / "plan.json"), server_rate=2.0)).server_rate == 2.0


@pytest.mark.parametrize("variant", ["untied", "tied", "padded"])
@pytest.mark.parametrize("sync", ["adapter", "reload"])
def test_an_engine_of_another_base_is_named(sync, variant, far, teacher_dir, tokenizer, tmp_path):
    """Of a student that trains an adapter; whole weights are brought by the first sync, so that one may be another."""
    own, other = (save_tiny(tmp_path / str(seed), variant=variant, seed=seed) for seed in (1, 2))
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    with fake_vllm(model, tokenizer, Behaviour(version="0.32.0", root="/models/own")) as engine:
        servers = far[0], engine
        problems, notes = server_problems(written(tmp_path, servers, teacher_dir, sync, student=own))
        assert problems == [] and len(notes) == 1, "the measured rate"
        problems, notes = server_problems(written(tmp_path, servers, teacher_dir, sync, student=other))
    said = problems if sync == "adapter" else notes[:1]
    assert len(problems) == (sync == "adapter") and len(said) == 1
    if sync == "adapter":
        assert "does not serve the student's base" in said[0] and f"--model {other} --dtype float32" in said[0]
    else:
        assert "holds other weights than" in said[0] and "first sync brings its own" in said[0]


@pytest.mark.parametrize("sync", ["adapter", "reload"])
def test_an_engine_in_another_dtype_is_named(sync, far, teacher_dir, tokenizer, tmp_path):
    """The first sync would stop the run, of whole weights too."""
    own = save_tiny(tmp_path / "own", variant="untied", scale=2.0)
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16).eval()
    with fake_vllm(model, tokenizer, Behaviour(version="0.32.0")) as engine:
        (problem,), _ = server_problems(written(tmp_path, (far[0], engine), teacher_dir, sync, student=own))
        assert "does not serve the student's base" in problem and "--dtype float32" in problem
        config = yaml.safe_load((tmp_path / "train.yaml").read_text()) | {"dtype": "bfloat16"}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
        assert server_problems(tmp_path / "train.yaml")[0] == []


def test_too_short_rows_several_models_and_a_lost_student_are_named(far, teacher_dir, tmp_path):
    far[1][1].max_model_len = 256
    (problem,), _ = server_problems(written(tmp_path, far, teacher_dir))
    assert "takes 256 tokens a row, and a response alone may have 256" in problem and "--max-model-len" in problem
    far[1][1].max_model_len = 512
    (problem,), _ = server_problems(written(tmp_path, far, teacher_dir, student=str(tmp_path / "nowhere")))
    assert "nowhere cannot be read" in problem
    far[1][1].name = "big"
    content = yaml.safe_load(written(tmp_path, far, teacher_dir).read_text())
    content["rollout_engine"]["model"] = "small"
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    (problem,), _ = server_problems(tmp_path / "train.yaml")
    assert "serves 'big'; 'small' is asked for" in problem


def test_a_large_base_is_compared_by_name(far, teacher_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_states, "RUN_BELOW", 0)
    monkeypatch.setattr(hidden_states, "_CHANCE", -100.0)  # the teacher is random
    far[1][1].root = teacher_dir
    assert len(server_problems(written(tmp_path, far, teacher_dir))[1]) == 1
    far[1][1].root = "/models/another"
    problems, notes = server_problems(written(tmp_path, far, teacher_dir))
    assert problems == [] and "says that it serves another, tiny" in notes[0] and "the first sync compares" in notes[0]


def test_lightnings_yaml_is_read_too(far, teacher_dir, tmp_path):
    content = yaml.safe_load(written(tmp_path, far, teacher_dir, "adapter").read_text())
    module = {name: content[name] for name in ("panel", "rollout_engine")}
    other = save_tiny(tmp_path / "other", variant="untied", seed=5)
    for student, wrong in ((teacher_dir, 0), (other, 1)):
        nested = {"model": {"class_path": "TeacherPanelModule", "init_args": {"model": student, **module}}}
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump(nested | {"data": {"prompts": "prompts.jsonl"}}))
        problems, notes = server_problems(tmp_path / "fit.yaml")
        assert len(problems) == wrong and len(notes) == 1, "the teacher in the block is asked as well"
    del module["panel"]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"model": module}))
    assert "names no student" in server_problems(tmp_path / "fit.yaml")[1][0]
