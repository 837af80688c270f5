"""The whole demo on a tiny teacher: the same code as the real one, in seconds."""

import io
import json
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from kd_plugin.cli.main import main
from kd_plugin.demo import stages
from kd_plugin.demo.run import run_demo
from kd_plugin.demo.state import DemoConfig
from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage import load_record, verify
from tests.tiny import save_tiny

CHECKPOINTS = ("teacher-math", "student-start", "offline", "panel")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("demo") / "teacher", layers=3)


def settings(teacher, directory, **changes):
    return replace(DemoConfig.smoke(), teacher=teacher, student_layers="0,2", output_dir=str(directory), **changes)


def run(config, **kwargs):
    console = Console(file=io.StringIO(), width=120)
    code = run_demo(config, console, **kwargs)
    return code, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    code, text = run(settings(teacher, directory))
    return directory, code, text


def test_it_ends_well_and_shows_what_it_did(finished):
    directory, code, text = finished
    assert code == 0
    for words in ("license gate", "by this package's own word", "KL to the general teacher", "KL to the math teacher",
                  "before", "after offline KD", "after the panel", "Files", "The same on your own data",
                  "kd-plugin lineage show"):  # fmt: skip
        assert words in text
    assert str(directory / "panel") in text


def test_every_checkpoint_carries_its_lineage_to_the_teacher(finished):
    directory, _, _ = finished
    for name in CHECKPOINTS:
        assert verify(directory / name).exit_code == 0, name
    record = load_record(directory / "panel")
    assert record["run"]["method"] == "teacher_panel"
    names = {node["name"] for node in record["nodes"]}
    assert {"teacher", "teacher-math", "student-start", "offline"} <= names
    assert {"open-thought/reasoning-gym"} <= {node.get("repo") for node in record["nodes"]}


def test_a_changed_checkpoint_fails_the_demo(finished, teacher):
    directory, _, _ = finished
    weights = directory / "panel" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code, text = run(settings(teacher, directory))
    finally:
        weights.write_bytes(whole)
    assert code == 2
    assert "panel: " in text and "panel: verified" not in text


def test_a_finished_demo_trains_nothing_again(finished, teacher, monkeypatch):
    directory, _, first = finished
    before = (directory / "panel" / "lineage.json").read_bytes()
    for name in ("train_specialist", "make_student", "write_answers", "fill_cache", "train_offline", "train_panel"):
        monkeypatch.setattr(stages, name, lambda stage: pytest.fail("done again"))
    code, text = run(settings(teacher, directory))
    assert code == 0
    assert "Going on in" in text and text.count("done before") == 9
    assert (directory / "panel" / "lineage.json").read_bytes() == before
    table = first[first.index("Held-out") : first.index("Files")]
    assert table == text[text.index("Held-out") : text.index("Files")]


def test_an_interrupted_demo_goes_on_where_it_was_and_comes_out_the_same(finished, teacher, tmp_path):
    """A demo that was killed in the middle of the panel: files are there, and no record that it is done."""
    copy = tmp_path / "out"
    shutil.copytree(finished[0], copy)
    state = json.loads((copy / "demo.json").read_text())
    reference = dict(state["stages"])
    for stage in ("panel", "measured panel"):
        del state["stages"][stage]
    (copy / "demo.json").write_text(json.dumps(state))
    (copy / "panel" / "half-written").write_text("x")
    code, text = run(settings(teacher, copy))
    assert code == 0
    assert text.count("done before") == 7
    assert not (copy / "panel" / "half-written").exists()
    resumed = json.loads((copy / "demo.json").read_text())["stages"]
    for stage, result in reference.items():
        for key in set(result) - {"seconds"}:
            assert resumed[stage][key] == result[key], stage


def test_a_teacher_without_a_license_stops_before_anything_is_trained(tmp_path):
    teacher = save_tiny(tmp_path / "nameless", license=None, layers=3)
    with pytest.raises(LicenseRefusedError, match=r"apache-2\.0"):
        run(settings(teacher, tmp_path / "out"))
    assert not (tmp_path / "out" / "teacher-math").exists()


def test_the_command_prints_and_takes_its_settings(teacher, tmp_path, capsys):
    assert main(["demo", "--smoke", "--config", "--seed", "9"]) == 0
    text = capsys.readouterr().out
    assert "seed: 9\n" in text and "specialist_steps: 2\n" in text
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert main(["demo", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "holds no demo (thesis.tex)" in capsys.readouterr().err
