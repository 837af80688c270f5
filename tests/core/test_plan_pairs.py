"""A plan recommends no pair that training would refuse, says what it did not check, and fits the terminal."""

import json

import pytest

from kd_plugin.cli.main import main
from kd_plugin.planner.architectures import hub_id, known_models, known_tokenizer
from kd_plugin.planner.run import pairs
from tests.tiny import save_tiny

QWEN, LLAMA, R1 = "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("a plan asks no network")

    monkeypatch.setattr("kd_plugin.lineage.discovery.ask_hub", asked)


def plan(capsys, *argv, code=0):
    assert main(["plan", "--json", *argv]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("student", "teacher"), [(QWEN, LLAMA), (LLAMA, QWEN), ("qwen2.5-0.5b", R1)])
def test_a_teacher_of_other_tokens_is_not_recommended(student, teacher, capsys, tmp_path):
    argv = ["--student", student, "--teachers", f"[{teacher}:sharded]"]
    found = plan(capsys, *argv, "--output", str(tmp_path / "out"), code=3)
    assert found["recommended"] is None and found["pairs"][0]["tokens"] == "no"
    assert not (tmp_path / "out").exists()
    assert main(["plan", *argv]) == 3
    assert capsys.readouterr().out.startswith("Training refuses")


def test_one_bad_teacher_of_a_panel_is_enough(capsys):
    teachers = f"[Qwen/Qwen2.5-14B:sharded, {LLAMA}:sharded]"
    found = plan(capsys, "--student", QWEN, "--teachers", teachers, code=3)
    assert [pair["tokens"] for pair in found["pairs"]] == ["yes", "no"]


def test_what_was_not_checked_is_said(capsys):
    teachers = f"[{R1}:sharded, math-lora:server]"
    found = plan(capsys, "--student", LLAMA, "--teachers", teachers)["pairs"]
    assert [pair["tokens"] for pair in found] == ["not checked", "not checked"]
    assert "special tokens may differ" in found[0]["tokens_because"]
    assert found[1]["terms"] == "not checked" and "math-lora is not known here" in found[1]["terms_because"]
    assert main(["plan", "--student", LLAMA, "--method", "offline", "--lora_rank", "8"]) == 0
    assert "neither its tokens nor its terms were checked" in " ".join(capsys.readouterr().out.split())


def test_models_on_the_disk_are_compared_token_by_token(tmp_path):
    names = {name: tmp_path / name for name in ("student", "same", "other", "bare", "forbidden")}
    save_tiny(names["student"])
    save_tiny(names["same"], seed=1)
    save_tiny(names["other"], swap=("a", "b"))
    save_tiny(names["bare"], license=None)
    for file in names["bare"].glob("token*"):
        file.unlink()
    save_tiny(names["forbidden"], license="cc-by-nc-nd-4.0")
    same, other, bare, forbidden = pairs(
        str(names["student"]), [str(names[n]) for n in ("same", "other", "bare", "forbidden")]
    )
    assert (same.tokens, same.terms, same.refused) == ("yes", "yes", False)
    assert other.tokens == "no" and "ids differ" in other.tokens_because and other.refused
    assert (bare.tokens, bare.terms, bare.refused) == ("not checked", "not checked", False)
    assert forbidden.terms != "yes"


@pytest.mark.parametrize("terms", ["Use of outputs to train other models is forbidden", "llama2"])
def test_terms_that_forbid_training_are_refused(tmp_path, terms):
    save_tiny(tmp_path / "student")
    save_tiny(tmp_path / "teacher", license="llama2")
    (pair,) = pairs(str(tmp_path / "student"), [str(tmp_path / "teacher")])
    assert pair.terms == "no" and pair.refused
    assert "Llama 2" in pair.terms_because


def test_every_known_model_names_its_tokenizer():
    for name in known_models():
        assert known_tokenizer(name) in ("Qwen2.5", "Llama 3", "Qwen2.5/R1-Distill", "Llama 3/R1-Distill")
        assert hub_id(name) == name == hub_id(name.split("/")[-1].lower())
        assert ("R1-Distill" in name) == known_tokenizer(name).endswith("/R1-Distill")


@pytest.mark.parametrize("columns", [80, 100, 120, 240])
@pytest.mark.parametrize(
    "argv",
    [
        ["--student", "Qwen/Qwen2.5-32B", "--teachers", "[Qwen/Qwen2.5-72B:sharded, math:server]", "--nodes", "2"],
        ["--student", QWEN, "--teachers", f"[{LLAMA}:sharded]"],
        ["--student", "meta-llama/Llama-3.1-70B", "--method", "offline", "--host_memory", "100"],
    ],
)
def test_the_plan_fits_the_terminal_and_begins_with_its_verdict(argv, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["plan", *argv])
    shown = capsys.readouterr().out
    assert shown.split()[0] in ("Recommended:", "Training", "Nothing")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in shown
    (header,) = [line.split() for line in lines if line.startswith("layout")]
    assert {"weights", "peak", "host", "s/step", "fits"} <= set(header)
    assert ("buckets" in header) == (columns == 240)
