"""A ladder of tiny students: where it stops, what it says before it begins, what stays, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from kd_plugin.cli.main import main
from kd_plugin.evaluation.ladder import Rung, climb
from kd_plugin.evaluation.results import Evaluation, TaskResult
from kd_plugin.evaluation.statistics import rate
from kd_plugin.lineage import verify
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
SMALL = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none"}


def simulated(rung, accuracy, draw, questions=200, answers=4):
    hard = draw.normal(0, 1, questions)
    right = 1 / (1 + np.exp(-(np.log(accuracy / (1 - accuracy)) * 1.2 - hard)))
    shares = (draw.binomial(answers, right) / answers).tolist()
    result = TaskResult("own", {1: rate(shares)}, questions, answers, 0.0, 5.0, {}, {})
    return Evaluation(Path(), rung.name, {"own": result})


def test_it_stops_at_the_right_rung_in_ten_of_ten_seeds():
    """Students that are right in 5, 7 and 9 of 10 cases, and a bar of 0.8: only the third one's holds."""
    truth = {"small": 0.5, "middle": 0.7, "large": 0.92}
    rungs = [Rung(name, name, 10**i, {"output_dir": name}) for i, name in enumerate(truth, 6)]
    for bar, stops in ((0.8, "large"), (0.55, "middle"), (0.35, "small"), (0.99, None)):
        for seed in range(10):
            draw, trained = np.random.default_rng(seed), []
            found = climb(
                rungs, {"own": bar},
                lambda rung, draw=draw, trained=trained: (
                    trained.append(rung.name) or 1.0, simulated(rung, truth[rung.name], draw),
                ),
                lambda words: None,
            )  # fmt: skip
            assert found[-1].holds == (stops is not None), (bar, seed)
            assert found[-1].rung.name == (stops or "large"), (bar, seed)
            assert trained == [one.rung.name for one in found]  # none beyond it was trained


@pytest.fixture
def ladder(tmp_path, monkeypatch, student_dir, other_teacher_dir, teacher_dir):
    """Writes a ladder of two students, and returns its path."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} and {i}?", "completion": f" {i}", "answer": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    large = save_tiny(tmp_path / "large", seed=5, hidden=64)

    def write(verify="tests.hosts.test_eval_tasks:vowel", **changes):
        own = {"rows": "rows.jsonl", "verify": verify, "completions": 2, "max_new_tokens": 6}
        recipe = {
            "teachers": {"one": teacher_dir}, "data": {"dataset": "rows.jsonl"}, "capture": {"k": 4}, "offline": SMALL,
        }  # fmt: skip
        content = {
            "output_dir": "ladder", "rungs": [student_dir, {"student": large, "offline": {"max_steps": 3}}],
            "recipe": recipe, "tasks": {"tasks": {"own": own}}, "bar": 0.99, "price_per_hour": 2.0,
            "plan": {"gpus_per_node": 1, "rows": 1000}, **changes,
        }  # fmt: skip
        path = tmp_path / "ladder.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return str(path)

    return write


def always(response, row):
    return True


def test_it_climbs_to_the_top_where_none_is_good_enough(ladder, capsys):
    assert main(["ladder", "--config", ladder()]) == 3
    told = capsys.readouterr()
    outcome = json.loads(Path("ladder/outcome.json").read_text())
    assert [one["holds"] for one in outcome["rungs"]] == [False, False] and outcome["rung"] is None
    assert "No rung meets the bar for sure" in told.out and told.out.count(" parameters; ZeRO") == 2
    assert outcome["rungs"][0]["parameters"] < outcome["rungs"][1]["parameters"]
    page = Path("ladder/report.html").read_text()
    assert "Accuracy against size" in page and "Accuracy against price so far" in page and "http" not in page
    caches = list(Path("ladder").rglob("manifest.json"))
    assert [str(path) for path in caches] == ["ladder/captures/cache-one/manifest.json"]  # it stays
    for place in Path("ladder").glob("[0-9]-*/offline"):
        assert verify(place).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("ladder").rglob("*.safetensors")}
    assert main(["ladder", "--config", ladder()]) == 3 and "it does not hold for sure" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in Path("ladder").rglob("*.safetensors")}


def test_it_stops_at_the_first_that_is_good_enough(ladder, capsys):
    given = ladder(verify="tests.hosts.test_ladder:always", bar={"own": 0.5})
    assert main(["ladder", "--config", given]) == 0
    assert "Take 1-student: its lower bound meets the bar." in capsys.readouterr().out
    assert not list(Path("ladder").glob("2-*/offline"))


def test_terms_that_forbid_a_later_rung_are_said_before_the_first_is_trained(ladder, capsys, student_dir, tmp_path):
    forbidden = save_tiny(tmp_path / "forbidden", seed=6, license=None)
    rungs = [student_dir, forbidden]
    assert main(["ladder", "--config", ladder(rungs=rungs)]) == 1
    assert "the terms forbid 2-forbidden" in capsys.readouterr().err
    assert not list(Path("ladder").rglob("*.safetensors")) and not list(Path("ladder").rglob("manifest.json"))
    assert main(["ladder", "--config", ladder(rungs=rungs), "--dry-run"]) == 1
    assert main(["ladder", "--config", ladder(rungs=rungs, skip_blocked=True)]) == 3
    assert list(Path("ladder").glob("1-student/offline/*.safetensors"))


def test_the_example_of_a_ladder_is_taken(ladder, tmp_path, student_dir, teacher_dir, capsys):
    """examples/ladder.yaml with examples/recipe.yaml and examples/tasks.yaml, and tiny models in the place of names."""
    ladder()
    (tmp_path / "examples").mkdir()
    (tmp_path / "questions.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    for name in ("ladder.yaml", "recipe.yaml", "tasks.yaml"):
        text = (ROOT / "examples" / name).read_text().replace("TEACHER}", f"{teacher_dir}}}")
        text = text.replace("- SMALL", f"- {student_dir}").replace("LARGE,", f"{tmp_path / 'large'},")
        (tmp_path / "examples" / name).write_text(text)
    assert main(["ladder", "--config", "examples/ladder.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("decision") >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bar": 1.5}, "bar is 1.5"),
        ({"bar": {"mine": 0.5}}, "bar: there is no task 'mine'"),
        ({"bar": None}, "bar is not set"),
        ({"rungs": [{"name": "x"}]}, r"rungs[0]: expected a student"),
        ({"rungs": [{"student": "x", "ofline": {}}]}, "Did you mean 'offline'"),
        ({"rungs": ["a/x", {"student": "b", "name": "1-x"}]}, "Two rungs have the same name"),
        ({"plan": {"gpus": 1}}, "plan: unknown key 'gpus'"),
    ],
)
def test_what_is_wrong_shows_before_anything_runs(changes, message, ladder, capsys):
    assert main(["ladder", "--config", ladder(**changes)]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(Path("ladder").rglob("*.safetensors"))
