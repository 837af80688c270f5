"""Which differences are real: against tables, and by simulation of methods whose truth is known."""

import numpy as np
import pytest

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.decisions import _quantile as quantile
from kd_plugin.evaluation.decisions import accuracy, chance_of, compare_all, holm


@pytest.mark.parametrize(
    ("freedom", "size"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (60, 2.000), (1e9, 1.960)]
)
def test_students_distribution_is_that_of_the_tables(freedom, size):
    assert chance_of(size, freedom) == pytest.approx(0.05, abs=2e-4)
    assert quantile(freedom) == pytest.approx(size, abs=2e-3)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def trained(draw, methods, seeds=3, questions=60, answers=2, seed_spread=0.3):
    """Simulate methods: each has a skill, each training its luck, each question its difficulty."""
    hard = draw.normal(0, 1, questions)
    found = {}
    for name, skill in methods.items():
        luck = draw.normal(0, seed_spread, (seeds, 1))
        shares = 1 / (1 + np.exp(-(skill + luck - hard)))
        found[name] = (draw.binomial(answers, shares) / answers).tolist()
    return found


@pytest.mark.parametrize(("seeds", "seed_spread"), [(3, 0.0), (3, 0.3), (3, 1.0)])
def test_equal_methods_are_rarely_said_to_differ(seeds, seed_spread):
    """Five of them, ten pairs, 200 pilots: at most 1 in 20 finds any difference, whatever the luck of a training."""
    draw, equal = np.random.default_rng(7), dict.fromkeys("abcde", 0.3)
    pilots = (compare_all(trained(draw, equal, seeds, seed_spread=seed_spread)) for _ in range(200))
    wrong = sum(any(pair.real for pair in pairs) for pairs in pilots)
    assert wrong <= 19  # 10 are expected at most, and three standard deviations are 9 more


def test_a_real_difference_is_found():
    draw, found = np.random.default_rng(3), 0
    for _ in range(60):
        pairs = compare_all(trained(draw, {"weak": -0.8, "strong": 1.0}, questions=100))
        found += pairs[0].real and pairs[0].first == "strong"
    assert found >= 45


def test_the_interval_of_a_gap_holds_the_truth():
    """Truth: the mean gap over all questions and trainings, by a large simulation."""
    many = trained(np.random.default_rng(1), {"a": 0.0, "b": 0.8}, seeds=200, questions=2000)
    truth = np.mean(many["b"]) - np.mean(many["a"])
    draw, held, runs = np.random.default_rng(2), 0, 400
    for _ in range(runs):
        (pair,) = compare_all(trained(draw, {"a": 0.0, "b": 0.8}))
        low, high = (pair.gap.low, pair.gap.high) if pair.first == "b" else (-pair.gap.high, -pair.gap.low)
        held += low <= truth <= high
    assert held >= 0.93 * runs


def test_an_accuracy_of_several_seeds_is_less_sure_where_they_differ():
    alike, apart = (
        [[1.0] * 30 + [0.0] * 30] * 3,
        [[1.0] * 45 + [0.0] * 15, [1.0] * 30 + [0.0] * 30, [1.0] * 15 + [0.0] * 45],
    )
    assert accuracy(alike).value == accuracy(apart).value == 0.5
    assert accuracy(apart).high - accuracy(apart).low > accuracy(alike).high - accuracy(alike).low


def test_other_numbers_of_questions_are_refused():
    with pytest.raises(ConfigError, match="3 questions against 2"):
        compare_all({"a": [[1.0, 0.0, 1.0]], "b": [[1.0, 0.0]]})
