"""`kd-plugin offline` and `kd-plugin panel` train from YAML alone."""

import json
import textwrap
from dataclasses import fields

import pytest
import torch.distributed as dist
import yaml
from datasets import Dataset
from trl import ModelConfig, ScriptArguments

from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.cli import training
from kd_plugin.cli.main import main
from kd_plugin.cli.training import parse
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.lineage import verify
from kd_plugin.panel.block import panel_from_block
from kd_plugin.panel.checks import require_defined_panel
from kd_plugin.panel.settings import TeacherSettings
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig
from tests.hosts.runs import settings


def write(path, **content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_offline(tmp_path, student_dir, teacher_dir):
    rows = Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(8)])
    capture(rows, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)
    common = settings(tmp_path / "out", model_name_or_path=student_dir, teacher_cache=str(tmp_path / "cache"))
    config = write(tmp_path / "run.yaml", **common)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert main(["offline", "--config", config, "--max_steps", "2", "--kd_weight", "0.5"]) == 0
    assert verify(tmp_path / "out").exit_code == 0
    # An interpreter that ends with a Gloo group open aborts now and then
    assert not dist.is_initialized()


def test_panel(tmp_path, student_dir, teacher_dir, other_teacher_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}?", "teacher_id": "ab"[i % 2]}) + "\n" for i in range(8)))
    common = settings(tmp_path / "out", model_name_or_path=student_dir, dataset_name=str(prompts), max_steps=1)
    config = write(
        tmp_path / "run.yaml",
        **common,
        teacher_models={"a": teacher_dir, "b": other_teacher_dir},
        max_completion_length=4,
        use_peft=True,
    )
    assert main(["panel", "--config", config]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert verify(tmp_path / "out").exit_code == 0


def shouted(row):
    return {"prompt": row["prompt"].upper(), "completion": row["completion"]}


@pytest.mark.parametrize("form", ["mixture", "stream", "part of a file", "column of text"])
def test_training_takes_the_forms_of_data_that_a_capture_takes(form, tmp_path, monkeypatch, student_dir, teacher_dir):
    monkeypatch.chdir(tmp_path)
    for name, columns in (("a", ("prompt", "completion")), ("b", ("question", "answer")), ("c", ("content", "text"))):
        rows = [dict(zip(columns, (f"{name}{i}?", f" {i}"), strict=True)) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    function = {"path": "a.jsonl", "formatting": f"{__name__}:shouted"}
    mixed = [
        {**function, "fraction": 0.5},
        {"path": "b.jsonl", "fraction": 0.25, "columns": {"question": "prompt", "answer": "completion"}},
        {"path": "b.jsonl", "fraction": 0.25, "template": {"prompt": "Q: {question}", "completion": "{answer}"}},
    ]
    captured, trained, count = {
        "mixture": ({"datasets": mixed}, {"datasets": mixed}, 12),
        "stream": ({"datasets": [function], "streaming": True}, {"datasets": [function], "dataset_streaming": True}, 6),
        "part of a file": (
            {"dataset": "a.jsonl", "split": "train[1:5]"},
            {"dataset_name": "a.jsonl", "dataset_train_split": "train[1:5]"},
            4,
        ),
        "column of text": (
            {"dataset": "c.jsonl", "dataset_text_field": "content"},
            {"dataset_name": "c.jsonl", "dataset_text_field": "content"},
            6,
        ),
    }[form]
    capturing = write(tmp_path / "capture.yaml", **captured, teacher=teacher_dir, output_dir="cache", k=4)
    assert main(["capture", "--config", capturing]) == 0
    assert len(TeacherCache("cache")) == count
    common = settings(tmp_path / "out", model_name_or_path=student_dir, max_steps=1, **trained)
    # Each row is joined to its targets, or the run would be refused
    assert main(["offline", "--config", write(tmp_path / "offline.yaml", **common, teacher_cache="cache")]) == 0
    if form == "mixture":
        common |= {"teacher_models": {"one": teacher_dir}, "max_completion_length": 4, "output_dir": "panel"}
        assert main(["panel", "--config", write(tmp_path / "panel.yaml", **common)]) == 0


@pytest.mark.parametrize(
    ("command", "config_class", "ours"),
    [("panel", TeacherPanelConfig, TeacherSettings), ("offline", OfflineKDConfig, OfflineSettings)],
)
def test_help_shows_our_fields_first_and_all_fields_on_request(command, config_class, ours, capsys):
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([command, "--help-all"]) == 0
    long = capsys.readouterr().out
    assert f"kd-plugin {command} --config {command}.yaml" in short
    names = {field.name for cls in (config_class, ModelConfig, ScriptArguments) for field in fields(cls)}
    assert all(f"--{name} " in long for name in names)
    own = [field.name for field in fields(ours)]
    assert all(f"--{name} " in short for name in [*own, "lineage", "output_dir", "model_name_or_path"])
    assert short.index(f"--{own[0]} ") < short.index("the student (TRL") and "--adam_beta1 " not in short


def test_the_example_in_the_help_is_a_configuration_that_is_taken(tmp_path, teacher_dir, other_teacher_dir):
    _, _, text = training._PANEL.example.partition("panel.yaml:\n")
    content = textwrap.dedent(text[: text.index("\n\n")])
    (tmp_path / "run.yaml").write_text(content.replace("TEACHER", teacher_dir).replace("OTHER", other_teacher_dir))
    _, config, model = parse("panel", TeacherPanelConfig, ["--config", str(tmp_path / "run.yaml"), "--use_cpu"])
    built = panel_from_block(config.panel)
    require_defined_panel(built, built.divergence, 1.0)
    assert model.model_name_or_path == "STUDENT" and built.teachers_of(None, "algebra") == ("math",)


def test_panel_from_one_block(tmp_path, student_dir, teacher_dir, other_teacher_dir, capsys):
    """A mixed panel with a domain of its own, and the teacher's own settings, from YAML alone."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}?", "domain": "xy"[i % 2]}) + "\n" for i in range(8)))
    common = settings(tmp_path / "out", model_name_or_path=student_dir, dataset_name=str(prompts), max_steps=2)
    block = {
        "combine": "weighted_kl",
        "divergence": "forward_kl",
        "domain_weights": {"x": {"a": 1.0}},
        "teachers": {
            "a": {"model": teacher_dir, "placement": "offload", "weight": {"start": 1.0, "end": 0.5, "steps": 2}},
            "b": {"model": other_teacher_dir, "divergence": "reverse_kl", "estimator": "sampled"},
        },
    }
    config = write(tmp_path / "run.yaml", **common, panel=block, max_completion_length=4)
    assert main(["panel", "--config", config]) == 0
    assert verify(tmp_path / "out").exit_code == 0
    block["teachers"]["b"]["divergenc"] = "jsd"
    config = write(tmp_path / "wrong.yaml", **common, panel=block)
    assert main(["panel", "--config", config]) == 2
    assert "teacher 'b': unknown key 'divergenc'. Did you mean 'divergence'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["offline", "panel"])
def test_an_unknown_key_names_the_nearest(command, tmp_path, capsys):
    config = write(tmp_path / "run.yaml", output_dir=str(tmp_path / "out"), learning_rat=1e-3)
    assert main([command, "--config", config]) == 2
    assert "unknown key 'learning_rat'. Did you mean 'learning_rate'" in capsys.readouterr().err
    assert main([command, "--divergenc", "forward_kl"]) == 2
    assert "Did you mean '--divergence'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
