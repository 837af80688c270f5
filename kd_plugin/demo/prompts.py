"""The questions that the demo bundles, in two domains.

``python -m kd_plugin.demo.prompts`` generates the arithmetic ones with reasoning-gym
(https://github.com/open-thought/reasoning-gym, Apache-2.0), whose generators are seeded, so that a test regenerates
them and compares. That needs the extra ``dev``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

MATH, GENERAL = "math", "general"
DOMAINS = (MATH, GENERAL)
# Small enough for a model of 135M parameters to learn in a minute, and short, since prompts cost time too.
TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 30},
}
SEED = 20261124
PER_TASK = 160
HELD_OUT_PER_TASK = 8


@dataclass(frozen=True)
class Question:
    """A prompt of the demo.

    Attributes:
        domain: ``math`` (problems from reasoning-gym) or ``general``; names the teacher that scores it.
        text: what the user asks.
        answer: the known answer of a math problem, from which the math teacher learns; None in ``general``.
    """

    domain: str
    text: str
    answer: str | None = None

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question as a conversation, the form of TRL's ``prompt`` column."""
        return [{"role": "user", "content": self.text}]


def questions(split: str, domain: str, limit: int) -> list[Question]:
    """Return the first ``limit`` bundled questions of a domain; ``split`` is ``train`` or ``held_out``."""
    if domain == MATH:
        rows = _bundle("arithmetic.json")[split]
        return [Question(MATH, row["question"], row["answer"]) for row in rows[:limit]]
    return [Question(GENERAL, text) for text in _bundle("general.json")[split][:limit]]


def available(split: str, domain: str) -> int:
    """How many questions of a domain are bundled."""
    return len(_bundle("arithmetic.json" if domain == MATH else "general.json")[split])


@cache
def _bundle(name: str) -> dict[str, Any]:
    return json.loads((files("kd_plugin.demo") / "data" / name).read_text(encoding="utf-8"))


def generate_bundle() -> dict[str, Any]:
    """Generate the bundle: ``train`` and ``held_out`` hold distinct problems, the tasks interleaved."""
    import reasoning_gym

    per_task: list[list[dict[str, str]]] = []
    for task, settings in TASKS.items():
        problems: dict[str, dict[str, str]] = {}
        for item in reasoning_gym.create_dataset(task, size=20 * PER_TASK, seed=SEED, **settings):
            question = item["question"].strip()
            problems.setdefault(question, {"task": task, "question": question, "answer": item["answer"].strip()})
        per_task.append(list(problems.values())[:PER_TASK])
    depth = max(map(len, per_task))
    rows = [rows[i] for i in range(depth) for rows in per_task if i < len(rows)]
    held_out = HELD_OUT_PER_TASK * len(TASKS)
    return {
        "license": "Apache-2.0",
        "source": f"reasoning-gym {version('reasoning-gym')}, seed {SEED}",
        "held_out": rows[:held_out],
        "train": rows[held_out:],
    }


def as_json(bundle: dict[str, Any]) -> str:
    """Return the bundle as JSON with one problem a line, which makes diffs readable."""
    lines = ["{", f'  "license": {json.dumps(bundle["license"])},', f'  "source": {json.dumps(bundle["source"])},']
    for split in ("held_out", "train"):
        rows = ",\n".join(f"    {json.dumps(row)}" for row in bundle[split])
        lines.append(f'  "{split}": [\n{rows}\n  ]' + ("," if split == "held_out" else ""))
    return "\n".join([*lines, "}"]) + "\n"


def main() -> None:
    """Write the bundle into the package's source."""
    target = Path(str(files("kd_plugin.demo") / "data" / "arithmetic.json"))
    target.write_text(as_json(generate_bundle()), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
