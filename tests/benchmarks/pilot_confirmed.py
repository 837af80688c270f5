"""Does a pilot pick the method that a full run confirms? Three cases with tiny models, whose right answers differ.

    python -m tests.benchmarks.pilot_confirmed --output out

The problems are those of examples/reasoning: long solutions in which one wrong step spoils the rest.

``sure``: the teacher learned on solutions without a slip. Its distributions are narrow and its text is right, so
offline KD on what it writes should suffice.

``broad``: the teacher learned on solutions in which letters are wrong and taken back. At T = 1 its distributions are
broad and its text has slips in it, which offline KD copies; reverse KL on what the student writes takes what is
likeliest.

``good``: the teacher of ``sure``, and a student that is right on most problems already.

A pilot is run, and then every method once more for ``--factor`` times the budget with seeds of its own. Each pilot's
choice is compared with what the full runs say by the same rule. What is done is not done again.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml

from examples.reasoning.methods import MAX_NEW_TOKENS
from examples.reasoning.models import STUDENT_WIDTH, TEACHER_WIDTH, new_model, save, teach
from examples.reasoning.problems import LENGTHS, LONG, held_out, held_out_prompts, problems
from kd_plugin.cli.main import main as command
from kd_plugin.evaluation.decisions import compare_all
from kd_plugin.evaluation.results import shares_of

METHODS = ["offline_teacher", "offline_student", "panel"]
QUESTIONS = 60
CASES = {  # updates of the teacher and its slips; updates of the student, and whether its rate falls
    "sure": ((500, 0.0), (600, False)),
    "broad": ((1500, 0.08), (600, False)),
    "good": ((500, 0.0), (1200, True)),
}


def build(case, place):
    """Make the teacher, the student and the rows of a case; return the parts of a pilot's configuration."""
    place.mkdir(parents=True, exist_ok=True)
    without = held_out_prompts(QUESTIONS)
    (taught, slips), (learned, falls) = CASES[case]
    if not (place / "teacher" / "README.md").is_file():
        teacher = new_model(TEACHER_WIDTH, seed=0)
        teach(teacher, taught, 3e-3, seed=0, without=without, slips=slips, decay=True)
        save(teacher, place / "teacher", "teacher")
    if not (place / "student" / "README.md").is_file():
        student = new_model(STUDENT_WIDTH, seed=7)
        teach(student, learned, 4e-3, seed=1, without=without, decay=falls)
        save(student, place / "student", "student")
    for name, found in (("rows", problems(4000, LENGTHS, 5, without)), ("questions", held_out(QUESTIONS)[LONG])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(one.row) + "\n" for one in found))
    own = {"rows": str(place / "questions.jsonl"), "verify": "examples.reasoning.problems:solved", "completions": 2}
    own |= {"max_new_tokens": MAX_NEW_TOKENS, "sampling_temperature": 1.0, "sampling_top_p": 1.0}
    small = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 50}
    small |= {"per_device_train_batch_size": 32, "lr_scheduler_type": "constant", "adam_beta2": 0.98}
    small |= {"eval_tasks_batch_size": 128}
    return {
        "student": str(place / "student"), "teachers": {"t": str(place / "teacher")},
        "data": {"dataset": str(place / "rows.jsonl"), "license": "own"}, "tasks": {"tasks": {"own": own}},
        "methods": METHODS, "capture": {"k": 16, "max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32"},
        "offline": small, "panel": {**small, "max_completion_length": MAX_NEW_TOKENS, "divergence": "reverse_kl"},
        "learning_rates": [3e-4, 1e-3], "scan_share": 0.5, "evaluations": 2,
    }  # fmt: skip


def piloted(config, place, name, **changes):
    """Run a pilot, and return its outcome."""
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(place / name), **changes}))
    assert command(["pilot", "--config", str(path)]) == 0
    return json.loads((place / name / "outcome.json").read_text())


def last_shares(runs):
    """Return the (S, Q) shares of right answers at the end of each seed's run."""
    found = []
    for run in sorted(runs.glob("*-final-*")):
        places = sorted(run.glob("*/evaluations/step-*"), key=lambda place: int(place.name[5:]))
        found.append(list(shares_of(places[-1] / "own")))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--budget", type=float, default=7e10, help="of a run of the pilot: about 40 updates")
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    output, found = Path(asked.output), {}
    for case in asked.cases:
        config = build(case, output / case)
        pilot = piloted(config, output / case, "pilot", budget=asked.budget, seeds=list(range(asked.seeds)))
        rates = {name: one["learning_rate"] for name, one in pilot["methods"].items()}
        full, shares = {}, {}
        for name in METHODS:  # each with the learning rate that its pilot chose
            one = piloted(
                {**config, "methods": [name], "learning_rates": [rates[name]]}, output / case, f"full-{name}",
                budget=asked.budget * asked.factor, seeds=[100 + i for i in range(asked.seeds)],
            )  # fmt: skip
            full[name] = one["methods"][name]["accuracy"]
            shares[name] = last_shares(output / case / f"full-{name}" / "runs")
        behind = {pair.second for pair in compare_all(shares) if pair.real}
        best = next(name for name in METHODS if name not in behind)  # as a pilot chooses: the simplest that is unbeaten
        found[case] = {"pilot": pilot, "full": full, "best": best}
        print(f"{case}: the pilot takes {pilot['winner']} ({pilot['why']}); the full runs say {best}", flush=True)
        for name in METHODS:
            small, large = pilot["methods"][name]["accuracy"], full[name]
            print(f"  {name:<16} pilot {small['value']:.3f} [{small['low']:.3f}, {small['high']:.3f}]  "
                  f"full {large['value']:.3f} [{large['low']:.3f}, {large['high']:.3f}]", flush=True)  # fmt: skip
        (output / "confirmed.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
