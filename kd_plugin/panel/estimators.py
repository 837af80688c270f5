"""How a divergence is estimated from what a teacher gives, and which combinations are defined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.teachers.base import Gives, Teacher

EstimatorName = Literal["exact", "sampled", "topk_tail", "chunk_likelihood", "byte_marginals"]
# Of which signals a teacher must give one
_NEEDED: Mapping[EstimatorName, frozenset[Gives]] = {
    "exact": frozenset({"hidden"}),
    "topk_tail": frozenset({"hidden", "top_k", "draws"}),
    "sampled": frozenset({"hidden", "sampled_token"}),
    "chunk_likelihood": frozenset({"hidden", "sampled_token"}),
    "byte_marginals": frozenset({"hidden"}),
}
_WHAT = {
    "exact": "all of it",
    "topk_tail": "its likeliest tokens",
    "sampled": "the log-probability of the token that stands next",
    "chunk_likelihood": "the log-probability of the token that stands next",
    "byte_marginals": "all of it",
}


@dataclass(frozen=True)
class Estimator:
    """How a teacher's divergence from the student is estimated.

    - ``exact``: the divergence itself, over the whole vocabulary. Needs a teacher in this process.
    - ``sampled``: the policy gradient on the token that the student sampled, (log q − log p)·∇ log q. Its mean is the
      gradient of the reverse KL, of no other divergence. Needs each teacher's log-probability of that token.
    - ``topk_tail``: the divergence over the listed tokens and one outcome for all others. Listed are the teacher's
      ``top_k`` likeliest tokens, the sampled token, and the student's ``student_top_k`` likeliest. Biased. Of a teacher
      that reads tokens of its own they are said in the student's, and the student's likeliest are not listed.
    - ``chunk_likelihood``: the divergence of two outcomes, the chunk of tokens that stands there and anything else.
      Biased, of small variance, and needs what ``sampled`` needs.
    - ``byte_marginals``: for a teacher that reads tokens of its own: the divergence of the two distributions over the
      next byte, at every byte of the response. Needs the teacher's whole distribution, as ``exact`` does.

    Attributes:
        name: one of the five.
        top_k: of ``topk_tail``, for teachers in this process; a server's or a cache's list is as long as it is.
        student_top_k: of ``topk_tail``. None takes ``top_k`` for teachers in this process. A server or a cache cannot
            be asked about the student's tokens, so there it is 0 in any case.
        ratio_bounds: of ``sampled``: the ratio of the student's probability of the token now to that when it was
            sampled is kept between these two. It is 1 where the student has not changed in between.
        tau: of ``chunk_likelihood``: both log-likelihoods are divided by it, so that long chunks do not all look
            impossible.

    Raises:
        ConfigError: an unknown name, or a number out of range.
    """

    name: EstimatorName = "exact"
    top_k: int = 64
    student_top_k: int | None = None
    ratio_bounds: tuple[float, float] = (0.5, 2.0)
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(EstimatorName):
            raise ConfigError(
                f"Unknown estimator {self.name!r}; expected one of {', '.join(get_args(EstimatorName))}."
                + nearest(str(self.name), list(get_args(EstimatorName)))
            )
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; expected at least 1.")
        if self.student_top_k is not None and self.student_top_k < 0:
            raise ConfigError(f"student_top_k is {self.student_top_k}; expected at least 0.")
        if not (math.isfinite(self.tau) and self.tau > 0.0):
            raise ConfigError(f"tau is {self.tau}; expected a positive number.")
        low, high = self.ratio_bounds
        if not (0.0 <= low <= 1.0 <= high and math.isfinite(high)):
            raise ConfigError(f"ratio_bounds are {self.ratio_bounds}; expected (low, high) with 0 <= low <= 1 <= high.")


def require_defined(
    name: str, teacher: Teacher, estimator: Estimator, combine: str, divergence: Divergence, temperature: float
) -> None:
    """Refuse a combination that is not defined.

    Args:
        name: of the teacher.
        teacher: what gives the signal.
        estimator: what estimates from it.
        combine: how the panel combines.
        divergence: of this teacher.
        temperature: of this teacher.

    Raises:
        ConfigError: says why it is not defined, and what is.
    """
    needs = MODES[combine].needs
    if needs and estimator.name == "byte_marginals":
        raise ConfigError(
            f"combine={combine!r} needs {needs}, and estimator='byte_marginals' of teacher {name!r} knows the bytes of "
            "its tokens. Use combine='weighted_kl' or 'route'."
        )
    if needs and estimator.name != "exact":
        one_token = estimator.name in ("sampled", "chunk_likelihood")
        gives = "one token" if one_token else "the listed tokens, and different ones for each teacher"
        raise ConfigError(
            f"combine={combine!r} needs {needs}, and estimator={estimator.name!r} of teacher {name!r} knows {gives}. "
            "Use combine='weighted_kl', or teachers in this process with estimator='exact'."
        )
    if estimator.name == "sampled" and divergence.name != "reverse_kl":
        raise ConfigError(
            f"{divergence.name} cannot be estimated from the token that the student sampled (teacher {name!r}): only "
            "reverse_kl is a mean over the student's own tokens, the others also average over the teacher's. Use "
            "divergence='reverse_kl', or estimator='topk_tail' or 'exact'."
        )
    has = teacher.capabilities
    if estimator.name == "sampled" and not has.any_row:
        raise ConfigError(
            f"Teacher {name!r} is {has.kind}: its rows were not generated by the student, so the sampled estimator is "
            "not defined for them. Use estimator='topk_tail'."
        )
    if "draws" in has.gives and divergence.name != "forward_kl":
        raise ConfigError(
            f"Teacher {name!r} is {has.kind} of sampled targets, whose counts estimate an average over the teacher's "
            f"tokens; {divergence.name} is none. Use divergence='forward_kl' for this teacher, or capture top-k."
        )
    needed = _NEEDED[estimator.name]
    if not needed & has.gives:
        others = [repr(other) for other, signals in _NEEDED.items() if signals & has.gives]
        raise ConfigError(
            f"Teacher {name!r} is {has.kind}, which gives some tokens of its distribution; estimator="
            f"{estimator.name!r} needs {_WHAT[estimator.name]}. Use estimator={' or '.join(others)}, for the panel or "
            "for this teacher alone."
        )
    if has.temperature is not None and temperature != has.temperature:
        raise ConfigError(
            f"The temperature of teacher {name!r} is {temperature}, but {has.kind} gave its log-probabilities at "
            f"{has.temperature}, and from some tokens those at another temperature cannot be recovered. Use "
            f"temperature={has.temperature}, or a teacher in this process."
        )
