"""What the answers to a task say of a model, and how sure one can be of it.

Several answers to one question are alike, so questions are what is counted, and not answers: standard errors are those
of a mean over questions (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, sections 2.2 and 4.2).

Intervals hold their 95 in 100 at small numbers too, where a mean plus and minus two standard errors does not: of one
model Wilson's with the number of independent answers that the standard error implies (Korn and Graubard 1998), of a
difference Agresti's and Min's (Statistics in Medicine 24, 2005) with the spread of the questions' differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from kd_plugin.errors import ConfigError


@dataclass(frozen=True)
class Estimate:
    """A rate with its uncertainty.

    Attributes:
        value: in [0, 1]; of a difference in [-1, 1].
        error: its standard error, clustered by question.
        low: lower end of the interval.
        high: upper end.
        questions: how many questions it rests on.
    """

    value: float
    error: float
    low: float
    high: float
    questions: int

    def __str__(self) -> str:
        """Return the value with its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at(k: int, right: int, answers: int) -> float:
    """Return the probability that of ``k`` answers to one question at least one is right, without bias.

    1 - C(n - c, k) / C(n, k): Chen et al., arXiv 2107.03374, equation 1.

    Args:
        k: at most ``answers``.
        right: c, right answers among those that were drawn.
        answers: n, answers that were drawn.
    """
    if not 1 <= k <= answers:
        raise ConfigError(f"pass@{k} of {answers} answers a question: expected k from 1 to {answers}. Draw more.")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def rate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Estimate the mean of one value a question, each in [0, 1], such as the share of its answers that are right.

    Args:
        values: one a question.
        level: of the interval.
    """
    if not values:
        raise ConfigError("A task without questions has no rate.")
    count, mean = len(values), fmean(values)
    error = stdev(values) / math.sqrt(count) if count > 1 else 0.0
    # Answers to one question may be alike in full, or independent: as many as the error says, and no fewer than those
    independent = mean * (1.0 - mean) / error**2 if error > 0.0 else float(count)
    low, high = _wilson(mean, max(independent, float(count)), _quantile(level, count))
    return Estimate(mean, error, low, high, count)


def difference(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Estimate:
    """Estimate the difference of two models on the same questions, question by question.

    Args:
        ours: one value a question, in [0, 1].
        theirs: those of the other model, in the same order.
        level: of the interval.
    """
    if len(ours) != len(theirs) or not ours:
        raise ConfigError(f"{len(ours)} questions against {len(theirs)}: a difference needs the same questions.")
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    count, mean = len(gaps), fmean(gaps)
    error = stdev(gaps) / math.sqrt(count) if count > 1 else 0.0
    # Two more questions, with gaps of the usual size that sum to 0: half of one each way, and no gap
    apart = [gap * gap for gap in gaps if gap]
    centre = sum(gaps) / (count + 2)
    squares = (sum(apart) + (fmean(apart) if apart else 1.0)) / (count + 2)
    reach = _quantile(level, count) * math.sqrt(max(squares - centre**2, 0.0) / (count + 2))
    return Estimate(mean, error, max(centre - reach, -1.0), min(centre + reach, 1.0), count)


def _wilson(share: float, count: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` independent answers, ``z`` standard errors wide on either side."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def _quantile(level: float, questions: int) -> float:
    """Student's quantile for that many questions, by its expansion (Abramowitz and Stegun 26.7.5)."""
    z, freedom = NormalDist().inv_cdf(0.5 + level / 2), max(questions - 1, 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
