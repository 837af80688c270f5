"""What a panel's vote lets through: accuracy of accepted corrections against the rate at which one teacher lies.

    python -m tests.benchmarks.text_vote --output build/text_vote     # a minute
    python -m tests.benchmarks.text_vote --quick --output DIR         # checks that it runs

Panels of three and of five teachers correct responses of a student that is always wrong, on reasoning-gym's
``basic_arithmetic``. The honest teachers err at a rate of 0.1, each on its own, when they write and when they evaluate.
One teacher lies at the given rate: it then writes a wrong answer, approves of wrong ones and rejects right ones. A
cunning liar finds every response wrong as well, so that it always writes. The first figure is the share of accepted
corrections that are right; the second the share of responses for which one was accepted. The third is about a student
that is always right: the share of its responses that a wrong correction took the place of. ``teacher`` accepts whatever
the first teacher, the liar, writes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import reasoning_gym

from kd_plugin.lineage import Source
from kd_plugin.text.correcting import CorrectingPanel
from kd_plugin.text.correction import CorrectionSettings
from kd_plugin.text.teaching import Case, Correction, Evaluation

ERROR, WRONG = 0.1, "wrong"


@dataclass
class Fallible:
    """A teacher that lies at one rate and errs at another."""

    name: str
    lies: float
    draws: random.Random
    cunning: bool = False
    source: Source = field(default_factory=lambda: Source(name="scripted", signal="text"))

    def evaluate(self, cases):
        found = []
        for case in cases:
            right = case.response == case.row["answer"]
            lies = self.draws.random() < self.lies
            wrong = lies or self.draws.random() < ERROR
            is_response = case.response in (WRONG, case.row["asked"])
            found.append(Evaluation(0.0 if lies and self.cunning and is_response else float(right != wrong)))
        return found

    def correct(self, cases, first_wrong):
        found = []
        for case in cases:
            wrong = self.draws.random() < self.lies or self.draws.random() < ERROR
            found.append(Correction(f"{case.row['answer']}{self.draws.randrange(9)}" if wrong else case.row["answer"]))
        return found


def measure(
    count: int, teachers: int, rate: float, accept: str, *, cunning: bool = False, right: bool = False
) -> tuple[float, float]:
    """Return the accuracy of accepted corrections, and the share of responses that have one."""
    draws = random.Random(7)
    names = [f"t{i}" for i in range(teachers)]
    panel = {name: Fallible(name, rate if i == 0 else 0.0, draws, cunning) for i, name in enumerate(names)}
    if accept == "teacher":
        panel = {"t0": panel["t0"]}
    rows = [
        {"answer": entry["answer"], "asked": entry["answer"] if right else WRONG}
        for entry in reasoning_gym.create_dataset("basic_arithmetic", size=count, seed=1)
    ]
    cases = [Case("q", row["asked"], row, tuple(panel)) for row in rows]
    outcomes = CorrectingPanel(panel, CorrectionSettings(accept=accept)).correct(cases)
    accepted = [outcome.text == outcome.case.row["answer"] for outcome in outcomes if outcome.text is not None]
    return sum(accepted) / max(len(accepted), 1), len(accepted) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    count, rates = (50, [0.0, 1.0]) if given.quick else (4000, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    given.output.mkdir(parents=True, exist_ok=True)
    kinds = {
        "teacher": (3, "teacher", False), "three": (3, "majority", False), "three, cunning": (3, "majority", True),
        "five": (5, "majority", False), "five, cunning": (5, "majority", True),
    }  # fmt: skip
    found = {}
    for label, (teachers, accept, cunning) in kinds.items():
        found[label] = []
        for rate in rates:
            accuracy, share = measure(count, teachers, rate, accept, cunning=cunning)
            of_right, replaced = measure(count, teachers, rate, accept, cunning=cunning, right=True)
            spoilt = (1.0 - of_right) * replaced
            found[label].append((rate, accuracy, share, spoilt))
            print(
                f"{label:15} liar {rate:.1f}: accepted corrections right {accuracy:.3f}, responses corrected "
                f"{share:.3f}, right responses spoilt {spoilt:.3f}"
            )
    (given.output / "vote.json").write_text(json.dumps(found, indent=1))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    names = {label: f"{label}, majority" for label in kinds} | {"teacher": "the liar alone, accept: teacher"}
    for label, points in found.items():
        for column, axis in enumerate(axes):
            axis.plot([p[0] for p in points], [p[1 + column] for p in points], marker="o", label=names[label])
    labels = ("accepted corrections that are right", "responses with an accepted correction")
    for axis, name in zip(axes, labels, strict=True):
        axis.set_xlabel("rate at which one teacher lies")
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.02)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(given.output / "text_vote.png", dpi=110)


if __name__ == "__main__":
    main()
