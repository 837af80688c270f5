"""Which differences between methods are real, where each was trained with several seeds and asked the same questions.

A difference is uncertain for two reasons: other questions could have been asked, and another seed could have trained
another student. Both count. Where many pairs are compared, some differ by chance; that is accounted for too.

Shape suffixes: S seeds, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from statistics import fmean, variance

from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.statistics import Estimate, difference, rate

Scores = Sequence[Sequence[float]]  # (S, Q): of each question the share of its answers that are right
_INTERVALS = 100  # of Simpson's rule, which is exact to eight digits with them


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same questions.

    Attributes:
        first: the method with the higher accuracy.
        second: the other.
        gap: first less second, with a 95% interval that counts questions and seeds.
        chance: probability of a gap as large between equal methods (two-sided), among all pairs (Holm's adjustment).
    """

    first: str
    second: str
    gap: Estimate
    chance: float

    @property
    def real(self) -> bool:
        """Whether the difference stands: over all pairs, at most one comparison in twenty says so by mistake."""
        return self.chance < 0.05


def accuracy(scores: Scores) -> Estimate:
    """Estimate a method's accuracy: a 95% interval that counts questions, and seeds where there are several."""
    means_S, by_question_Q = _means(scores)
    found = rate(by_question_Q)
    more = variance(means_S) / len(means_S) if len(means_S) > 1 else 0.0
    if not more:
        return found
    # The interval of the questions, made longer as its variance grows by that of the seeds
    reach = max(found.high - found.value, found.value - found.low) / _quantile(len(by_question_Q) - 1)
    freedom = _freedom(reach**2, len(by_question_Q) - 1, more, len(means_S) - 1)
    wide = _quantile(freedom) * math.sqrt(reach**2 + more)
    return Estimate(
        found.value, math.sqrt(found.error**2 + more), max(found.value - wide, 0.0), min(found.value + wide, 1.0),
        found.questions,
    )  # fmt: skip


def compare_all(methods: Mapping[str, Scores]) -> list[Comparison]:
    """Compare every pair of methods, question by question.

    Args:
        methods: by name the (S, Q) scores: the same questions in the same order; as many seeds as each has.

    Raises:
        ConfigError: methods were asked different numbers of questions.
    """
    pairs = []
    for one, other in combinations(methods, 2):
        gap, chance = _gap(methods[one], methods[other])
        first, second = (one, other) if gap.value >= 0 else (other, one)
        if gap.value < 0:
            gap = Estimate(-gap.value, gap.error, -gap.high, -gap.low, gap.questions)
        pairs.append((first, second, gap, chance))
    adjusted = holm([chance for *_, chance in pairs])
    return [Comparison(a, b, gap, p) for (a, b, gap, _), p in zip(pairs, adjusted, strict=True)]


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979): all of them below 0.05 are so by mistake 1 time in 20."""
    adjusted, most = [0.0] * len(chances), 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        most = max(most, min(1.0, chances[i] * (len(chances) - rank)))
        adjusted[i] = most
    return adjusted


def _gap(ours: Scores, theirs: Scores) -> tuple[Estimate, float]:
    """Return ours less theirs, and the probability of as much by chance.

    The variance of the questions, from each question's mean over the seeds, plus what the seeds add to it: theirs are
    other trainings than ours, so each method's own counts.
    """
    ours_S, ours_Q = _means(ours)
    theirs_S, theirs_Q = _means(theirs)
    if len(ours_Q) != len(theirs_Q):
        raise ConfigError(f"{len(ours_Q)} questions against {len(theirs_Q)}: a difference needs the same questions.")
    found = difference(ours_Q, theirs_Q)
    centre, freedom_Q = (found.low + found.high) / 2, len(ours_Q) - 1
    if found.low <= -1.0 or found.high >= 1.0:
        centre = found.value * len(ours_Q) / (len(ours_Q) + 2)
    reach = max(found.high - centre, centre - found.low) / _quantile(freedom_Q)
    seeds = [(variance(means) / len(means), len(means) - 1) for means in (ours_S, theirs_S) if len(means) > 1]
    error, freedom = reach**2, _satterthwaite([(reach**2, freedom_Q), *seeds])
    error = math.sqrt(error + sum(one for one, _ in seeds))
    if not error:
        return found, 1.0
    wide = _quantile(freedom) * error
    estimate = Estimate(found.value, error, max(centre - wide, -1.0), min(centre + wide, 1.0), found.questions)
    return estimate, chance_of(abs(centre) / error, freedom)


def _means(scores: Scores) -> tuple[list[float], list[float]]:
    """Return each seed's mean over the questions, (S,), and each question's over the seeds, (Q,)."""
    if not scores or not scores[0] or len({len(one) for one in scores}) != 1:
        raise ConfigError(f"Scores of {[len(one) for one in scores]} questions; expected the same number of each seed.")
    return [fmean(one) for one in scores], [fmean(column) for column in zip(*scores, strict=True)]


def _freedom(first: float, first_freedom: float, second: float, second_freedom: float) -> float:
    return _satterthwaite([(first, first_freedom), (second, second_freedom)])


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of variances, each with its own (Satterthwaite 1946)."""
    below = sum(one * one / max(freedom, 1.0) for one, freedom in parts)
    return sum(one for one, _ in parts) ** 2 / below if below else 1e9


def chance_of(size: float, freedom: float) -> float:
    """Return the probability that Student's t with ``freedom`` degrees is farther from 0 than ``size``."""
    if freedom > 1e6:
        return math.erfc(size / math.sqrt(2.0))
    # t = sqrt(freedom) tan(angle) has a density in the angle that is proportional to cos(angle)^(freedom - 1)
    limit = math.atan(size / math.sqrt(freedom))
    step = limit / _INTERVALS
    heights = [math.cos(i * step) ** (freedom - 1) for i in range(_INTERVALS + 1)]
    inside = step / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return min(max(1.0 - scale * inside, 0.0), 1.0)


@cache
def _quantile(freedom: float) -> float:
    """Return the size that Student's t exceeds in 1 of 20 cases."""
    low, high = 0.0, 700.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance_of(middle, max(freedom, 1.0)) > 0.05 else (low, middle)
    return high
