"""Schedules: what they are at their ends and between, and what they refuse."""

from __future__ import annotations

import pytest

from kd_plugin.errors import ConfigError
from kd_plugin.panel.weights import Schedule, as_schedule


def test_a_number_stays():
    schedule = as_schedule(0.3, "x")
    assert [schedule.at(step) for step in (0, 5, 10**6)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(("shape", "middle", "quarter"), [("linear", 0.5, 0.25), ("cosine", 0.5, 0.14644660940672627)])
def test_it_goes_from_start_to_end(shape, middle, quarter):
    schedule = as_schedule({"start": 0, "end": 1, "steps": 8, "begin": 4, "shape": shape}, "x")
    assert [schedule.at(step) for step in (0, 4, 12, 99)] == [0, 0, 1, 1]
    assert schedule.at(8) == pytest.approx(middle)
    assert schedule.at(6) == pytest.approx(quarter)


def test_no_steps_is_a_jump():
    schedule = Schedule(start=1.0, end=2.0, begin=3)
    assert [schedule.at(step) for step in (0, 2, 3, 4)] == [1.0, 1.0, 2.0, 2.0]


def test_values_are_its_bounds():
    assert Schedule(2.0, 1.0, 5).values() == (1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"start": 0, "end": 1, "step": 5}, "unknown key 'step'.*steps"),
        ({"start": 0}, "lacks end"),
        ("fast", "expected a number"),
        (True, "expected a number"),
        ({"start": 0, "end": 1, "steps": -1}, "at least 0"),
        ({"start": 0, "end": float("inf")}, "finite"),
        ({"start": 0, "end": 1, "shape": "cosin"}, "cosine"),
    ],
)
def test_bad_schedules_are_refused(value, said):
    with pytest.raises(ConfigError, match=said):
        as_schedule(value, "on_policy_fraction")
