"""Does a pilot pick the method that a full run confirms? Two tasks with tiny models, where the right answers differ.

    python -m tests.benchmarks.pilot_confirmed --output out

``sums``: the student begins from nothing and the teacher adds two numbers step by step. What the student writes is
worth nothing at first, so offline KD on the teacher's text should suffice.

``walks``: from a number to a goal, one at a time. The teacher goes straight there, and back where a step went too far;
its own text shows no step too far. The student knows the straight way roughly, and errs: on policy it sees what to do
then.

A pilot is run, and then every method once more for ``--factor`` times the budget with seeds of its own. Each pilot's
choice is compared with the best of the full runs.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import yaml

from kd_plugin.cli.main import main as command
from tests.tiny import byte_tokenizer, tiny_llama

METHODS = ["offline_teacher", "offline_student", "panel"]


def sums(draw):
    """Return a question and what the teacher learns to write; every token of it is learned."""
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    low, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    steps = f"{a % 10}+{b % 10}={low};{a // 10}+{b // 10}+{carry}={a // 10 + b // 10 + carry};{a + b}"
    return f"{a}+{b}?", steps, [True] * len(steps), str(a + b)


def walks(draw, slips=0.25):
    """Return a walk with steps too far in it, which are shown and not learned; what follows each of them is learned."""
    goal, far = draw.randint(15, 85), draw.choice([-1, 1]) * draw.randint(2, 6)
    at, text, learned = goal + far, "", []
    while True:
        slip = draw.random() < slips
        step = 0 if at == goal else 1 if at < goal else -1
        if step == 0 and not slip:
            return f"{goal + far}>{goal}:", f"{text}.", [*learned, True], str(goal)
        at += draw.choice([-2, 2, 1, -1]) if slip else step
        at = min(max(at, 10), 90)
        text, learned = f"{text} {at}", [*learned, *[not slip] * 3]


def right(response, row):
    """Whether the last number of what was written is the answer."""
    last = response.strip(". ").replace(";", " ").split()
    return bool(last) and last[-1] == row["answer"]


def learn(model, task, steps, seed, batch=48, rate=3e-3, **options):
    """Train a model by cross-entropy on what a task gives, for as many steps."""
    tokenizer, draw = byte_tokenizer(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    model.train()
    for _ in range(steps):
        rows = [task(draw, **options) for _ in range(batch)]
        ids = [tokenizer(q + t)["input_ids"] + [tokenizer.eos_token_id] for q, t, *_ in rows]
        marks = [[False] * len(q) + list(learned) + [True] for q, _, learned, _ in rows]
        width = max(map(len, ids))
        given = torch.tensor([one + [0] * (width - len(one)) for one in ids])
        mark = torch.tensor([one + [False] * (width - len(one)) for one in marks])
        labels = torch.where(mark, given, -100)
        loss = model(input_ids=given, attention_mask=(given != 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), float(loss)


def saved(model, place, name):
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    (place / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {name}\n")
    return str(place)


def build(task, place, quick):
    """Make the teacher, the student and the rows of a task; return the parts of a pilot's configuration."""
    place.mkdir(parents=True, exist_ok=True)
    chosen = {"sums": sums, "walks": walks}[task]
    if not (place / "teacher").is_dir():
        big, small = (1500, 250) if quick else (4000, 400)
        student = tiny_llama(seed=1, hidden=32, layers=2, scale=1.0)
        if task == "walks":
            student, loss = learn(student, walks, small, 2, slips=0.0)
            print(f"{task}: student's loss {loss:.3f}")
        teacher, loss = learn(tiny_llama(seed=3, hidden=64, layers=3, scale=1.0), chosen, big, 4)
        print(f"{task}: teacher's loss {loss:.3f}")
        saved(student, place / "student", "student")
        saved(teacher, place / "teacher", "teacher")
    draw = random.Random(5)
    for name, count in (("rows", 4000), ("questions", 120)):
        rows = [
            dict(zip(("prompt", "answer"), (q, a), strict=True)) for q, _, _, a in (chosen(draw) for _ in range(count))
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    length = 36
    own = {"rows": str(place / "questions.jsonl"), "verify": "tests.benchmarks.pilot_confirmed:right", "completions": 2}
    own |= {"max_new_tokens": length, "sampling_temperature": 1.0, "sampling_top_p": 1.0}
    small = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 50}
    small |= {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"}
    return {
        "student": str(place / "student"), "teachers": {"t": str(place / "teacher")},
        "data": {"dataset": str(place / "rows.jsonl")}, "tasks": {"tasks": {"own": own}}, "methods": METHODS,
        "capture": {"k": 32, "max_new_tokens": length, "dtype": "float32"}, "offline": small,
        "panel": {**small, "max_completion_length": length}, "learning_rates": [1e-3, 3e-3], "evaluations": 3,
    }  # fmt: skip


def piloted(config, place, name, **changes):
    """Run a pilot, and return its outcome."""
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(place / name), **changes}))
    assert command(["pilot", "--config", str(path)]) == 0
    return json.loads((place / name / "outcome.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tasks", nargs="+", default=["sums", "walks"])
    parser.add_argument("--budget", type=float, default=6e10)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="teachers that are trained for less")
    asked = parser.parse_args()
    found = {}
    for task in asked.tasks:
        place = Path(asked.output) / task
        config = build(task, place, asked.quick)
        pilot = piloted(config, place, "pilot", budget=asked.budget, seeds=list(range(asked.seeds)))
        rates = {name: one["learning_rate"] for name, one in pilot["methods"].items()}
        full = {}
        for name in METHODS:  # each with the learning rate that its pilot chose
            one = piloted(
                {**config, "methods": [name], "learning_rates": [rates[name]]}, place, f"full-{name}",
                budget=asked.budget * asked.factor, seeds=[100 + i for i in range(asked.seeds)],
            )  # fmt: skip
            full[name] = one["methods"][name]["accuracy"]
        best = max(full, key=lambda name: full[name]["value"])
        found[task] = {"pilot": pilot, "full": full, "best": best, "confirmed": pilot["winner"] == best}
        print(f"{task}: the pilot takes {pilot['winner']} ({pilot['why']}); the full runs say {best}")
        for name in METHODS:
            small, large = pilot["methods"][name]["accuracy"], full[name]
            print(f"  {name:<16} pilot {small['value']:.3f} [{small['low']:.3f}, {small['high']:.3f}]  "
                  f"full {large['value']:.3f} [{large['low']:.3f}, {large['high']:.3f}]")  # fmt: skip
    (Path(asked.output) / "confirmed.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
