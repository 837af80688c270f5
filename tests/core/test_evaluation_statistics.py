"""How sure an evaluation is: intervals hold what they promise, by simulation, and pass@k is what is enumerated."""

import itertools

import numpy as np
import pytest

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation import difference, pass_at, rate

REPETITIONS = 1000
# How hard questions are, as beta distributions: even, all easy or all hard, mostly hard, mostly easy, alike
HARDNESS = ((1, 1), (0.3, 0.3), (0.5, 4), (8, 2), (40, 40))
# 1,000 repetitions of a true 0.95 lie within 0.936 and 0.964 in 19 of 20 cases; the mean over hardness is surer
NEAR = (0.93, 0.97)


@pytest.mark.parametrize("answers", [1, 4, 16])
@pytest.mark.parametrize("questions", [50, 200])
def test_the_interval_of_a_rate_holds_the_truth_in_95_of_100(questions, answers):
    random, covered = np.random.default_rng(questions + answers), []
    for a, b in HARDNESS:
        hits = 0
        for _ in range(REPETITIONS):
            right = random.binomial(answers, random.beta(a, b, questions)) / answers
            found = rate(right.tolist())
            hits += found.low <= a / (a + b) <= found.high
        covered.append(hits / REPETITIONS)
    assert NEAR[0] <= np.mean(covered) <= NEAR[1], covered
    assert min(covered) >= 0.92


@pytest.mark.parametrize("answers", [1, 4, 16])
@pytest.mark.parametrize("questions", [50, 200])
def test_the_interval_of_a_difference_holds_the_truth_in_95_of_100(questions, answers):
    random, covered = np.random.default_rng(7 * questions + answers), []
    for (a, b), shift in itertools.product(HARDNESS[:3], (0.0, 0.1)):
        everyone = random.beta(a, b, 400_000)
        truth = np.clip(everyone + shift, 0, 1).mean() - everyone.mean()
        hits = 0
        for _ in range(REPETITIONS):
            chance = random.beta(a, b, questions)
            ours = random.binomial(answers, np.clip(chance + shift, 0, 1)) / answers
            theirs = random.binomial(answers, chance) / answers
            found = difference(ours.tolist(), theirs.tolist())
            hits += found.low <= truth <= found.high
        covered.append(hits / REPETITIONS)
    assert NEAR[0] <= np.mean(covered) <= NEAR[1], covered
    assert min(covered) >= 0.92


def test_a_plain_interval_would_not():
    """Two standard errors about the mean, at 20 questions that are mostly hard: what this is here for."""
    random, plain, ours = np.random.default_rng(0), 0, 0
    for _ in range(REPETITIONS):
        right = random.binomial(1, random.beta(0.5, 9.5, 20)).astype(float)
        found = rate(right.tolist())
        plain += abs(found.value - 0.05) <= 1.96 * found.error
        ours += found.low <= 0.05 <= found.high
    assert plain / REPETITIONS < 0.75
    assert ours / REPETITIONS > 0.92


@pytest.mark.parametrize("answers", [1, 3, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(answers):
    for right, k in itertools.product(range(answers + 1), range(1, answers + 1)):
        choices = list(itertools.combinations([True] * right + [False] * (answers - right), k))
        assert pass_at(k, right, answers) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ConfigError, match="pass@3 of 2 answers a question: expected k from 1 to 2"):
        pass_at(3, 1, 2)
    with pytest.raises(ConfigError, match="without questions"):
        rate([])
    with pytest.raises(ConfigError, match="2 questions against 1"):
        difference([1.0, 0.0], [1.0])


def test_all_right_and_all_wrong_leave_room():
    assert rate([1.0] * 30).high == 1.0 and 0.85 < rate([1.0] * 30).low < 0.9
    assert rate([0.0] * 30).low == 0.0 and difference([0.0] * 30, [0.0] * 30).high > 0
