"""A real vLLM server as a teacher that only writes: captured from YAML, and a student of another tokenizer trained."""

import json
import re
from pathlib import Path

import pytest
import yaml

from kd_plugin.cache.targets import Generation
from kd_plugin.cli.main import main
from kd_plugin.lightning.__main__ import main as fit
from kd_plugin.lineage import load_record
from kd_plugin.text import Ask, LocalWriter, ServerWriter, in_order, load_text
from tests.tiny import save_tiny
from tests.vllm.test_vllm import pytestmark  # noqa: F401 - marks

PROMPTS = [{"prompt": f"What is {i} + {i}? Answer with a number.", "answer": str(2 * i)} for i in range(1, 9)]


@pytest.fixture(scope="module")
def text(smol, url, tmp_path_factory):
    """What SmolLM2 wrote, by the command, from YAML."""
    place = tmp_path_factory.mktemp("text")
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)) + "\n")
    config = {
        "targets": "text", "dataset": str(place / "prompts.jsonl"), "output_dir": str(place / "text"),
        "teacher": {"url": url, "model": "served", "repo": smol, "license": "apache-2.0", "stream": True},
        "completions": 3, "max_new_tokens": 48, "keep_unfinished": True,
    }  # fmt: skip
    (place / "capture.yaml").write_text(yaml.safe_dump(config))
    assert main(["capture", "--config", str(place / "capture.yaml")]) == 0
    return str(place / "text")


def test_what_came_is_counted_as_the_server_counts(text):
    rows = load_text(text)
    record = json.loads(Path(text, "teacher_text.json").read_text())
    tokens = record["outputs"]["tokens"]["teacher"]
    assert len(rows) + sum(record["dropped"].values()) == 24 and len(rows) >= 8
    assert 24 <= tokens["written"] <= 24 * 48 and tokens["read"] > 24 * 10
    assert any(re.search(r"\d", row["response"]) for row in rows)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_likeliest_text_is_that_of_the_model_in_this_process(smol, url, api):
    """By chat both render the same template; by completions the server is given what it rendered."""
    how = Generation(max_new_tokens=24, temperature=0.0)
    local = LocalWriter(smol, license="apache-2.0", dtype="float32")
    asks = [Ask(row["prompt"], how) for row in PROMPTS[:4]]
    expected = in_order(local, asks)
    if api == "completions":
        tokenizer = local._teacher.tokenizer
        rendered = [tokenizer.apply_chat_template(a.messages, add_generation_prompt=True, tokenize=False) for a in asks]
        asks = [Ask(prompt, how) for prompt in rendered]
    server = ServerWriter(url, "served", license="apache-2.0", api=api)
    found = in_order(server, asks)
    assert [a.text for a in found] == [a.text for a in expected]
    assert [a.ended for a in found] == [a.ended for a in expected]
    if api == "chat":
        assert [a.usage.read for a in found] == [a.usage.read for a in expected]


def test_a_student_of_another_tokenizer_trains_in_trl_and_in_lightning(text, tmp_path):
    student = save_tiny(tmp_path / "student", tied=False)
    lines = {
        "model_name_or_path": student, "teacher_text": text, "output_dir": str(tmp_path / "trl"), "kd_weight": 0.0,
        "ce_weight": 1.0, "max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(lines))
    assert main(["offline", "--config", str(tmp_path / "train.yaml")]) == 0
    config = {
        "trainer": {
            "max_steps": 3, "logger": False, "accelerator": "cpu", "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                           "init_args": {"dirpath": str(tmp_path / "lightning"), "filename": "last"}}],
        },
        "model": {"class_path": "OfflineKDModule", "init_args": {"model": student}},
        "data": {"text": text, "batch_size": 2},
    }  # fmt: skip
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    fit(["fit", "--config", str(tmp_path / "fit.yaml")])
    for directory in (tmp_path / "trl", tmp_path / "lightning" / "last.ckpt"):
        record = load_record(directory)
        taught = [edge for edge in record["edges"] if edge["kind"] == "trained_on_outputs"]
        # The teacher here is a checkpoint with a record of its own, and its licence stands behind it
        assert len(taught) == 2 and any("apache-2.0" in node.get("licenses", ()) for node in record["nodes"])
