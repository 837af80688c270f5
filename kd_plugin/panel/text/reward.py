"""A verifier on the panel: its reward weighs the divergence from the teachers that give distributions.

The simplest joint form of reward and distillation: rows whose response is right may count more than those that are
wrong, or the other way round, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kd_plugin.errors import ConfigError, require_known_keys
from kd_plugin.text.writers import split_reasoning
from kd_plugin.verifying import Verifier, make_verifier

if TYPE_CHECKING:
    from kd_plugin.panel.batches import Assigned, Host
    from kd_plugin.panel.roster import TeacherPanel
    from kd_plugin.rollouts.rows import Response


@dataclass(frozen=True)
class Reward:
    """How a verifier's verdict on a response weighs the divergence from the teachers that give distributions.

    A response that is right counts ``right`` times, one that is wrong ``wrong`` times, one with a score in between in
    between; a row that would count 0 times is neither scored nor counted.

    Attributes:
        check: the verifier.
        right: factor of a row whose response is right.
        wrong: factor of a row whose response is wrong.

    Raises:
        ConfigError: a factor below zero, or two that are 0.
    """

    check: Verifier
    right: float = 1.0
    wrong: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.right < math.inf and 0.0 <= self.wrong < math.inf and self.right + self.wrong > 0.0):
            raise ConfigError(
                f"The reward weighs right responses by {self.right} and wrong ones by {self.wrong}; expected numbers "
                "of at least 0, and one above it."
            )

    @classmethod
    def described(cls, given: Mapping[str, Any], where: str = "reward") -> Reward:
        """Read ``{verifier: math_verify, weight: W, answer_column: answer}``.

        ``weight`` is a mapping ``{right: 1.0, wrong: 0.25}``, or a number w from 0 to 1: right responses count once
        and wrong ones 1 - w times, so that 1 masks them.

        Raises:
            ConfigError: an unknown key, no verifier, or a weight that cannot be meant.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where} is {given!r}; expected a mapping with verifier and weight.")
        require_known_keys(given, ["verifier", "weight", "answer_column"], where)
        if given.get("verifier") is None:
            raise ConfigError(f"{where} names no verifier; expected verifier: math_verify, for instance.")
        check = make_verifier(given["verifier"], given.get("answer_column", "answer"))
        assert check is not None
        weight = given.get("weight", 1.0)
        if isinstance(weight, Mapping):
            require_known_keys(weight, ["right", "wrong"], f"{where}, weight")
            return cls(check, float(weight.get("right", 1.0)), float(weight.get("wrong", 0.0)))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight <= 1.0:
            raise ConfigError(
                f"{where}: weight is {weight!r}; expected a number from 0 (nothing) to 1 (masks wrong responses), or "
                "{right: X, wrong: Y}."
            )
        return cls(check, 1.0, 1.0 - float(weight))

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run compares."""
        return {"verifier": self.check.name, "right": self.right, "wrong": self.wrong}

    def factor(self, score: float) -> float:
        """Return how often a row counts whose response has a score in [0, 1]."""
        return self.wrong + (self.right - self.wrong) * score

    def scores(self, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the score of each response, in [0, 1].

        Raises:
            DataError: the verifier failed, or a row has no answer.
        """
        return [
            self.check.verify(split_reasoning(response)[0], row, f"The reward of response {number}").score
            for number, (response, row) in enumerate(zip(responses, rows, strict=True))
        ]


def weighed_rows(
    panel: TeacherPanel,
    host: Host,
    tokenizer: Any,
    assigned: Assigned,
    responses: Sequence[Response],
    positions: Sequence[list[int]],
) -> tuple[list[list[int]], list[float]]:
    """Say what of a generation batch teachers with distributions score, and how often each row counts.

    With a reward it is a collective call where the batch is trained on or logged. An evaluation weighs nothing.

    Args:
        panel: the teachers and the reward.
        host: the trainer.
        tokenizer: the student's.
        assigned: the rows.
        responses: one a row.
        positions: for each row the positions that may be trained on.

    Returns:
        For each row those that are scored, none where no such teacher or a reward of 0 is; and each row's factor.
    """
    scored = [any(name in panel.teachers for name in one.teachers) for one in assigned.assignments]
    factors = [1.0] * len(positions)
    if panel.reward is not None:
        chosen = [row for row, at in enumerate(positions) if at and scored[row]]
        texts = [tokenizer.decode(responses[row].tokens, skip_special_tokens=True) for row in chosen]
        scores = panel.reward.scores(texts, [assigned.rows[row] for row in chosen])
        if host.training:
            for row, score in zip(chosen, scores, strict=True):
                factors[row] = panel.reward.factor(score)
        if host.training or host.is_logged:
            local = torch.tensor([sum(scores), len(scores)], dtype=torch.float32)
            total, count = host.sum_over_ranks(local.to(host.device)).tolist()
            host.note({"reward": total / max(count, 1.0)})
    kept = [list(at) if scored[row] and factors[row] > 0.0 else [] for row, at in enumerate(positions)]
    return kept, factors
