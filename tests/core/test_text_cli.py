"""``kd-plugin capture`` with ``targets: text``: every setting arrives; what is wrong is said before a request."""

import dataclasses
import json

import pytest
import yaml

from kd_plugin import text as text_room
from kd_plugin.cli.main import main
from kd_plugin.text import LocalWriter, ServerWriter, TextSettings, load_text
from tests.core.text_help import right
from tests.core.text_worker import questions
from tests.scripted_writer import Script, scripted_writer


@pytest.fixture
def config(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, questions(6))) + "\n")

    def write(**values):
        path = tmp_path / "capture.yaml"
        base = {"targets": "text", "dataset": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "out")}
        path.write_text(yaml.safe_dump({**base, **values}))
        return str(path)

    return write


def test_from_yaml_to_a_dataset_and_again(config, tmp_path, capsys):
    with scripted_writer(Script(write=right)) as (url, script):
        teacher = {"url": url, "model": "scripted", "license": "mit", "prices": {"read": 1e6, "written": 2e6}}
        path = config(teacher=teacher, verify="contains", completions=2, max_new_tokens=10, shard_rows=2)
        assert main(["capture", "--config", path, "--dry-run"]) == 0
        assert "6 prompts, 12 texts of at most 10 tokens; at most" in capsys.readouterr().out and not script.log
        assert main(["capture", "--config", path]) == 0
        said = capsys.readouterr().out
        assert "6 rows (6 dropped: 6 same answer). Tokens: teacher: 36 read, 60 written. Spent: 156.00" in said
        assert main(["capture", "--config", path, "--deduplicate", "false"]) == 0
        assert "12 rows (0 rows dropped)" in capsys.readouterr().out and len(script.log) == 12
        path = config(teacher=teacher, output_dir=str(tmp_path / "b"), ceiling=320.0, max_new_tokens=100)
        assert main(["capture", "--config", path]) == 0
        assert "The ceiling of 320 is reached" in capsys.readouterr().out
    assert len(load_text(tmp_path / "out")) == 12


def test_every_setting_arrives(config, monkeypatch, tmp_path):
    values = {
        "completions": 3, "max_new_tokens": 77, "sampling_temperature": 0.3, "sampling_top_p": 0.8,
        "sampling_top_k": 9, "system": "be brief", "seed": 5, "ceiling": 2.5, "min_teachers": 2, "shard_rows": 3,
        "verify": "contains",
        "answer_column": "gold", "vote": {"by": r"(\d+)", "share": 0.7}, "keep_unfinished": True, "min_characters": 2,
        "max_characters": 99, "max_reasoning_characters": 88, "deduplicate": False, "decontaminate": ["eval.jsonl"],
        "ngram": 6, "overlap": 0.3, "keep": 2, "balance": ["domain"], "per_group": 4, "reasoning": "drop",
        "lineage": {"use": {"commercial": True}},
    }  # fmt: skip
    defaults = vars(TextSettings())
    assert {f.name for f in dataclasses.fields(TextSettings)} == set(values)
    assert not [name for name, value in values.items() if defaults[name] == value]
    found = {}

    def spy(rows, writers, output_dir, **fields):
        found.update(fields, writers=writers, output_dir=output_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_room, "capture_text", spy)
    teachers = {
        "a": {"url": "http://localhost:1", "model": "m", "api": "completions", "stream": True, "timeout": 3.0,
              "max_concurrency": 5, "max_retries": 2, "api_key_env": "K", "request": {"x": 1}, "prices": {"read": 1.0},
              "repo": "o/r", "revision": "main", "license": "mit"},
        "b": {"model": "org/local", "batch_size": 3, "license": "mit", "revision": "v1"},
        "c": "org/other",
    }  # fmt: skip
    assert main(["capture", "--config", config(teachers=teachers, **values)]) == 130
    assert {name: found[name] for name in values} == values
    a, b, c = found["writers"]
    assert isinstance(a, ServerWriter) and isinstance(b, LocalWriter) and isinstance(c, LocalWriter)
    assert [w.name for w in (a, b, c)] == ["a", "b", "c"]
    assert a.client.max_concurrency == 5 and a.prices.read == 1.0 and a.source.license == "mit"
    assert a.identity == {
        "kind": "server", "model": "m", "repo": "o/r", "revision": "main", "api": "completions", "request": {"x": 1}
    }  # fmt: skip
    assert b.source.ref == "org/local" and b.source.revision == "v1" and c.source.ref == "org/other"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "teacher and teachers: neither is given"),
        ({"teacher": "a", "teachers": {"b": "c"}}, "both are given"),
        ({"teacher": {"url": "http://localhost:1", "top_k": 3}}, "teacher: unknown key 'top_k'"),
        ({"teacher": {"batch_size": 3}}, "expected url, of a server, or model"),
        ({"teacher": {"url": "http://u:p@localhost:1"}}, "holds credentials"),
        ({"teacher": "a", "verfy": "exact"}, "Did you mean 'verify'"),
        ({"teacher": "a", "targets": "texts"}, "Did you mean 'text'"),
        ({"teacher": "a", "k": 3}, "unknown key 'k'"),
    ],
)
def test_what_is_wrong_is_said_at_once(config, capsys, values, message):
    assert main(["capture", "--config", config(**values)]) == 2
    assert message in capsys.readouterr().err


def test_text_is_appended_to_no_cache(config, capsys):
    assert main(["cache", "append", "--config", config(teacher="a")]) == 2
    assert "targets: text makes a dataset and no teacher cache" in capsys.readouterr().err


def test_help_and_settings_are_those_of_text(capsys):
    assert main(["capture", "--targets", "text", "--config"]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert said["reasoning"] == "think" and "k" not in said
    assert main(["capture", "--targets=text", "--help"]) == 0
    assert "decontaminate" in capsys.readouterr().out
