"""Three kinds of generated problems, each the speciality of one expert.

The problems come from reasoning-gym (https://github.com/open-thought/reasoning-gym, Apache-2.0), whose generators
are seeded: a seed names a set of problems for good. Item i of seed s is drawn from s + i, so that the seeds here stand
far apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Domain:
    """A reasoning-gym task.

    Attributes:
        settings: of its generator.
        asked: pattern of the question itself. What a question says of the answer's form is left out: the answers teach
            it, and it would be up to two thirds of all tokens.
        share: of the prompts that students are trained on.
    """

    settings: dict[str, Any]
    asked: str
    share: float


# Short questions that a model of 135M parameters cannot answer at first and can learn to. The shares follow how hard a
# domain is to learn: a reversal is soon learnt, and its answer of three words has the most tokens.
DOMAINS = {
    "chain_sum": Domain({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, r".*", 0.47),
    "word_sequence_reversal": Domain({"min_words": 3, "max_words": 3}, r"Reverse this list of words: .*", 0.13),
    "family_relationships": Domain({"min_family_size": 4, "max_family_size": 4}, r"(?s).*\?", 0.4),
}
SEEDS_APART = 10_000_000  # more than any set draws


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
    return _distinct(domain, 0, count, excluded=())


def training(domain: str, count: int, seed: int, excluded: Sequence[Problem]) -> list[Problem]:
    """Return ``count`` distinct problems of a domain, none of them among ``excluded``; a seed is 0 or more."""
    return _distinct(domain, 1 + seed, count, excluded=[problem.prompt for problem in excluded])


def _distinct(domain: str, seed: int, count: int, excluded: Sequence[str]) -> list[Problem]:
    import reasoning_gym

    seen = set(excluded)
    problems: list[Problem] = []
    dataset = reasoning_gym.create_dataset(domain, size=20 * count, seed=seed * SEEDS_APART, **DOMAINS[domain].settings)
    for entry in dataset:
        asked = re.search(DOMAINS[domain].asked, entry["question"].strip())
        if asked is None:
            raise ValueError(f"{domain} asks in another form than {DOMAINS[domain].asked!r}: {entry['question']!r}.")
        prompt = f"{asked.group()}\nAnswer:"
        if prompt not in seen:
            seen.add(prompt)
            problems.append(Problem(domain, prompt, entry["answer"].strip(), entry))
        if len(problems) == count:
            return problems
    raise ValueError(f"{domain} gives only {len(problems)} distinct problems of {count}; widen its settings.")
