"""A pilot with tiny models: equal cost, what it decides, that it goes on after it was killed, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kd_plugin.cli.main import main
from kd_plugin.evaluation import load_evaluation
from kd_plugin.evaluation.decisions import Comparison
from kd_plugin.evaluation.pilot.run import choose
from kd_plugin.evaluation.pilot.trials import METHODS
from kd_plugin.evaluation.statistics import Estimate
from kd_plugin.lineage import verify
from tests.scripted_writer import Script, scripted_writer

ROOT = Path(__file__).parents[2]
SMALL = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 2}


@pytest.fixture
def pilot(tmp_path, monkeypatch, student_dir, teacher_dir):
    """Writes a pilot over tiny models, and returns its path."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} and {i}?", "answer": str(i % 3)} for i in range(24)]
    for name, some in (("rows", rows), ("questions", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    tasks = {"rows": "questions.jsonl", "verify": "contains", "completions": 1, "max_new_tokens": 8}

    def write(**changes):
        content = {
            "output_dir": "pilot", "student": student_dir, "teachers": {"one": teacher_dir},
            "data": {"dataset": "rows.jsonl"}, "tasks": {"tasks": {"own": {**tasks, "sampling_temperature": 0.6}}},
            "methods": ["offline_student", "panel"], "budget": 3e8, "learning_rates": [1e-3, 1e-2], "seeds": [0, 1],
            "evaluations": 2, "probe_steps": 2, "offline": SMALL,
            "capture": {"k": 8, "max_new_tokens": 6, "keep_unfinished": True},
            "panel": {**SMALL, "max_completion_length": 6}, **changes,
        }  # fmt: skip
        path = tmp_path / "pilot.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return str(path)

    return write


def test_runs_of_equal_cost_a_report_and_the_winners_recipe(pilot, capsys):
    assert main(["pilot", "--config", pilot()]) == 0
    said = capsys.readouterr().out
    outcome = json.loads(Path("pilot/outcome.json").read_text())
    assert list(outcome["methods"]) == ["offline_student", "panel"]
    for one in outcome["methods"].values():
        assert one["cost"] == pytest.approx(3e8, rel=0.25) and one["seeds"] == 2
        costs = [cost for cost, _ in one["curve"]]
        assert len(costs) == 2 and costs == sorted(costs)
    assert "Take offline_student: no difference between the methods is real" in said
    assert "no difference that is sure" in said
    page = Path("pilot/report.html").read_text()
    assert "<svg" in page and "Accuracy against cost" in page and "http" not in page and "<script" not in page
    recipe = yaml.safe_load(Path("pilot/winner.yaml").read_text())
    assert recipe["capture"]["generate"]["by"] and "limit" not in recipe["capture"]
    assert main(["run", "pilot/winner.yaml", "--dry-run"]) == 0
    final = next(Path("pilot/runs").glob("panel-final-*-seed0"))
    assert verify(final / "panel").exit_code == 0
    # It is all there: nothing is run again, and a seed can be added
    before = {path: path.stat().st_mtime_ns for path in Path("pilot/runs").rglob("*.safetensors")}
    assert main(["pilot", "--config", pilot(seeds=[0, 1, 2])]) == 0
    after = {path: path.stat().st_mtime_ns for path in Path("pilot/runs").rglob("*.safetensors")}
    assert before.items() <= after.items() and len(after) > len(before)
    assert main(["pilot", "--config", pilot(budget=4e8)]) == 2
    assert "holds a pilot with other settings" in capsys.readouterr().err


def test_the_dry_run_runs_nothing_and_shows_the_terms(pilot, capsys):
    assert main(["pilot", "--config", pilot(methods=None), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 methods x (2 learning rates x 0.25 + 2 seeds)" in said and "decision" in said and "What to expect" in said
    assert not list(Path("pilot").rglob("*.safetensors"))
    refused = {"teachers": {"one": {"license": "openai-terms-of-use"}}}
    assert main(["pilot", "--config", pilot(lineage=refused)]) == 1


@pytest.mark.slow  # up to ten processes that import everything
def test_killed_at_any_time_it_goes_on_to_the_same_outcome(pilot):
    words = [sys.executable, "-m", "kd_plugin", "pilot", "--config"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def started(path):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*words, path], env=environment, **quiet)

    begun = time.monotonic()
    path = pilot(methods=["panel"], learning_rates=[1e-3], output_dir="whole")
    assert started(path).wait(400) == 0
    seconds, kills = time.monotonic() - begun, 0
    path = pilot(methods=["panel"], learning_rates=[1e-3])
    for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.5, 3, 10):  # of its time: the first of them end in mid-run
        process = started(path)
        try:
            process.wait(share * seconds)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0 and kills >= 1
    killed, whole = (json.loads(Path(name, "outcome.json").read_text()) for name in ("pilot", "whole"))
    for one in (killed, whole):
        for cost, _ in one["methods"]["panel"]["curve"]:
            assert cost > 0
    accuracies = [[found["value"] for _, found in one["methods"]["panel"]["curve"]] for one in (killed, whole)]
    assert accuracies[0] == accuracies[1] and killed["winner"] == whole["winner"]


def test_text_correction_and_a_warm_up(pilot, capsys):
    with scripted_writer(Script(write=lambda body: "It is 1.")) as (url, _):
        one = yaml.safe_load(Path(pilot()).read_text())["teachers"]["one"]
        words = {"kind": "server", "url": url, "signal": "text", "model": "scripted", "license": "mit"}
        words["prices"] = {"read": 1.0, "written": 2.0}
        given = pilot(
            methods=["warmup_panel", "text_correction"], teachers={"one": one, "words": words}, budget=1.5e8,
            text={"evaluate": "verifier", "verifier": "contains", "keep_weight": 1.0}, learning_rates=[1e-3], seeds=[0],
        )  # fmt: skip
        assert main(["pilot", "--config", given]) == 0, capsys.readouterr()
    found = json.loads(Path("pilot/outcome.json").read_text())["methods"]
    assert all(found["warmup_panel"]["steps"].values()) and found["text_correction"]["steps"]["panel"]
    final = next(Path("pilot/runs").glob("warmup_panel-final-*"))
    assert load_evaluation(sorted(final.glob("panel/evaluations/step-*"))[-1]).results["own"].questions == 6


def test_the_examples_of_pilot_and_tasks_are_taken(pilot, monkeypatch, tmp_path, student_dir, teacher_dir, capsys):
    """examples/pilot.yaml and examples/tasks.yaml, with tiny models in the place of the names."""
    pilot()
    (tmp_path / "examples").mkdir()
    for name in ("pilot.yaml", "tasks.yaml"):
        text = (ROOT / "examples" / name).read_text().replace("TEACHER}", f"{teacher_dir}}}")
        (tmp_path / "examples" / name).write_text(text.replace("student: STUDENT", f"student: {student_dir}"))
    assert main(["pilot", "--config", "examples/pilot.yaml", "--dry-run"]) == 0
    assert "4 methods x (3 learning rates x 0.25 + 3 seeds) runs of 1e+15 flops" in capsys.readouterr().out


def pair(first, second, chance, gap=0.2):
    return Comparison(first, second, Estimate(gap, 0.05, gap - 0.1, gap + 0.1, 50), chance)


@pytest.mark.parametrize(
    ("pairs", "winner", "words"),
    [
        ([pair("panel", "offline_teacher", 0.3)], "offline_teacher", "no difference"),
        (
            [pair("panel", "offline_teacher", 0.01), pair("panel", "offline_student", 0.2)],
            "offline_student",
            "nothing is really ahead of it; panel: not surely better, and less simple",
        ),
        (
            [pair("offline_student", "offline_teacher", 0.01), pair("panel", "offline_teacher", 0.01)],
            "offline_student",
            "really ahead of offline_teacher; panel: not surely better",
        ),
        (
            [pair("panel", "offline_teacher", 0.01), pair("panel", "offline_student", 0.02)],
            "panel",
            "really ahead of offline_teacher, offline_student",
        ),
    ],
)
def test_what_is_chosen_and_why(pairs, winner, words):
    from kd_plugin.evaluation.pilot.report import Result
    from kd_plugin.evaluation.pilot.trials import Steps

    reached = {"offline_teacher": 0.3, "offline_student": 0.4, "panel": 0.5}
    results = [
        Result(METHODS[n], 1e-4, Steps(), (), 1.0, Estimate(v, 0.1, v - 0.1, v + 0.1, 50), 3)
        for n, v in reached.items()
    ]
    method, why = choose(results, pairs)
    assert method.name == winner and words in why


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": None}, "budget is not set"),
        ({"unit": "joules"}, "Unknown unit 'joules'"),
        ({"methods": ["panl"]}, "Unknown method 'panl'"),
        ({"methods": ["text_correction"]}, "text_correction needs a teacher with signal: text"),
        ({"scan_seed": 1}, "scan_seed 1 is one of seeds"),
        ({"scan_share": 1.5}, "scan_share is 1.5"),
        ({"tasks": {"tasks": {"own": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        ({"panel": {"max_stps": 3}}, "panel: unknown key 'max_stps'. Did you mean 'max_steps'"),
    ],
)
def test_what_is_wrong_shows_before_anything_runs(changes, message, pilot, capsys):
    assert main(["pilot", "--config", pilot(**changes)]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(Path("pilot").rglob("*.safetensors"))
