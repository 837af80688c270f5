"""Three kinds of generated problems, each the speciality of one expert.

The problems come from reasoning-gym (https://github.com/open-thought/reasoning-gym, Apache-2.0), whose generators
are seeded: a seed names a set of problems for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Short questions that a model of 135M parameters cannot answer at first and can learn to.
DOMAINS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "word_sequence_reversal": {"min_words": 3, "max_words": 3},
    "family_relationships": {"min_family_size": 4, "max_family_size": 4},
}
HELD_OUT_SEED = 7  # training seeds start at 1000


@dataclass(frozen=True)
class Problem:
    """One question with its answer.

    Attributes:
        domain: the reasoning-gym task.
        prompt: what the model reads.
        answer: the text that scores 1.
        entry: what the task's own scorer needs.
    """

    domain: str
    prompt: str
    answer: str
    entry: dict[str, Any]

    def is_solved_by(self, response: str) -> bool:
        """Return whether the first line of ``response`` is the answer; partial credit counts as wrong."""
        import reasoning_gym

        line = response.strip().split("\n")[0].strip()
        return bool(reasoning_gym.get_score_answer_fn(self.domain)(line, self.entry) == 1.0)


def held_out(domain: str, count: int) -> list[Problem]:
    """Return ``count`` problems that no training set contains."""
    return _distinct(domain, HELD_OUT_SEED, count, excluded=())


def training(domain: str, count: int, seed: int, excluded: Sequence[Problem]) -> list[Problem]:
    """Return ``count`` distinct problems of a domain, none of them among ``excluded``."""
    return _distinct(domain, 1000 + seed, count, excluded=[problem.prompt for problem in excluded])


def _distinct(domain: str, seed: int, count: int, excluded: Sequence[str]) -> list[Problem]:
    import reasoning_gym

    seen = set(excluded)
    problems: list[Problem] = []
    dataset = reasoning_gym.create_dataset(domain, size=20 * count, seed=seed, **DOMAINS[domain])
    for entry in dataset:
        prompt = entry["question"].strip() + "\nAnswer:"
        if prompt not in seen:
            seen.add(prompt)
            problems.append(Problem(domain, prompt, entry["answer"].strip(), entry))
        if len(problems) == count:
            return problems
    raise ValueError(f"{domain} gives only {len(problems)} distinct problems of {count}; widen its settings.")
