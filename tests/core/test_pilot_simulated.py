"""A pilot's decisions with simulated trainings: equal cost, the right method, and none where none is better."""

import json
import zlib

import numpy as np
import pytest

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.cost import Cost
from kd_plugin.evaluation.pilot.report import as_plain, write_report
from kd_plugin.evaluation.pilot.run import Pilot
from kd_plugin.evaluation.pilot.settings import PilotConfig, State
from kd_plugin.evaluation.pilot.trials import Point, in_unit

ROW, OFFLINE_STEP, PANEL_STEP = 2.0, 3.0, 7.0


class Simulated(Point):
    """An evaluation whose shares are there already."""

    @property
    def shares(self):
        return self.evaluation


class SimulatedRuns:
    """Trainings with a truth: each method's skill at the best learning rate, the luck of each seed."""

    def __init__(self, skills, pilot, luck=0.15):
        self.skills, self.pilot, self.luck, self.ran = skills, pilot, luck, []

    def run(self, trial):
        self.ran.append(trial)
        draw = np.random.default_rng([self.pilot, zlib.crc32(trial.name.encode())])
        hard = np.random.default_rng(self.pilot).normal(0, 1, 80)
        found, cost = [], self.captured(trial) or Cost()
        for count, each in ((trial.steps.offline, OFFLINE_STEP), (trial.steps.panel, PANEL_STEP)):
            for i in range(trial.evaluations if count else 0):
                skill = self.skills[trial.method.name] - (trial.learning_rate != 1e-4) + draw.normal(0, self.luck)
                shares = draw.binomial(2, 1 / (1 + np.exp(hard - skill))) / 2
                at = cost + Cost(student_flops=count * each * (i + 1) / trial.evaluations)
                found.append(Simulated(at, shares.tolist()))
            cost = found[-1].cost if found else cost
        return found

    def captured(self, trial):
        return Cost(teacher_flops=trial.steps.rows * ROW) if trial.method.writes else None


def piloted(tmp_path, monkeypatch, skills, number, **changes):
    monkeypatch.setattr(Pilot, "_rows", 1000)
    config = PilotConfig(
        output_dir=str(tmp_path / str(number)), student="s", teachers={"t": "x"}, data={"dataset": "d"},
        tasks={"tasks": {"a": "b"}}, methods=list(skills), offline={"per_device_train_batch_size": 2},
        **{"budget": 2000.0, **changes},
    )  # fmt: skip
    pilot = Pilot(config, State.of(config), recipes=None)
    pilot.runs = SimulatedRuns(skills, number)
    return pilot.run(lambda words: None), pilot


def test_every_method_takes_the_budget_and_the_better_learning_rate(tmp_path, monkeypatch):
    skills = dict.fromkeys(["offline_teacher", "offline_student", "panel", "warmup_panel"], 0.0)
    found, pilot = piloted(tmp_path, monkeypatch, skills, 0)
    for one in found.results:
        assert one.cost == pytest.approx(2000.0, rel=0.02) and one.learning_rate == 1e-4, one.method.name
        costs = [cost for cost, _ in one.curve]
        assert costs == sorted(costs) and len(costs) in (4, 8)
    scans = [trial for trial in pilot.runs.ran if trial.kind == "scan"]
    assert len(scans) == 4 * 3 and {trial.seed for trial in scans} == {1000}
    finals = [trial for trial in pilot.runs.ran if trial.kind == "final"]
    assert len(finals) == 4 * 3 and {trial.seed for trial in finals} == {0, 1, 2}
    said = write_report(found, tmp_path / "0")
    assert all(name in said for name in skills) and (tmp_path / "0" / "winner.yaml").is_file()
    assert json.loads((tmp_path / "0" / "outcome.json").read_text())["winner"] == found.winner.name


@pytest.mark.parametrize(
    ("skills", "expected"),
    [
        ({"offline_teacher": 1.0, "offline_student": -0.8, "panel": -0.6}, "offline_teacher"),
        ({"offline_teacher": -0.8, "offline_student": -0.6, "panel": 1.0}, "panel"),
    ],
)
def test_it_takes_the_method_that_is_better(skills, expected, tmp_path, monkeypatch):
    chosen = [piloted(tmp_path, monkeypatch, skills, number)[0] for number in range(10)]
    assert [one.winner.name for one in chosen] == [expected] * 10
    assert all("really ahead of" in one.why for one in chosen)


def test_it_says_that_there_is_no_difference_where_there_is_none(tmp_path, monkeypatch):
    skills = dict.fromkeys(["offline_teacher", "offline_student", "panel"], 0.2)
    chosen = [piloted(tmp_path, monkeypatch, skills, number)[0] for number in range(40)]
    none = [one for one in chosen if "no difference between the methods is real" in one.why]
    assert len(none) >= 36 and all(one.winner.name == "offline_teacher" for one in none)


def test_a_cost_is_a_number_in_its_unit():
    cost = Cost(student_flops=3.0, teacher_flops=4.0, seconds=1800.0, money=0.5)
    assert [in_unit(cost, unit, 2.0) for unit in ("flops", "seconds", "money")] == [7.0, 1800.0, 1.5]


def test_a_budget_that_is_too_small_says_what_a_step_takes(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="budget 20 flops lasts for less than 4 steps of panel"):
        piloted(tmp_path, monkeypatch, {"panel": 0.0}, 0, budget=20.0)


def test_an_interrupted_pilot_keeps_what_it_decided(tmp_path, monkeypatch):
    first, _ = piloted(tmp_path, monkeypatch, {"panel": 0.0}, 0)
    again, pilot = piloted(tmp_path, monkeypatch, {"panel": 0.0}, 0)
    assert {trial.kind for trial in pilot.runs.ran} == {"final"}  # no probe and no scan again
    assert as_plain(first) == as_plain(again)
    with pytest.raises(ConfigError, match="holds a pilot with other settings"):
        piloted(tmp_path, monkeypatch, {"panel": 0.0}, 0, budget=3000.0)
