"""Merge three experts into one student: ``python -m examples.merge_experts.run --output_dir out``.

Fits a LoRA expert to each of three kinds of problems, then trains one student with the three as its panel, by several
recipes and seeds, and writes ``results.json``, ``results.md`` and ``results.png``. What is finished is not done again,
so an interrupted run goes on with the same command.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from peft import PeftModel

from examples.merge_experts.experts import accuracy, fit_expert, load_base, load_tokenizer
from examples.merge_experts.report import write_report
from examples.merge_experts.students import RECIPES, averaged, cache_answers, train_student
from examples.merge_experts.tasks import DOMAINS, Problem, held_out, training
from kd_plugin.demo.model import prepare_teacher


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        output_dir: everything is written here.
        expert_steps: updates of each expert.
        expert_rows: rows of an expert's update.
        expert_problems: distinct problems that an expert sees.
        student_steps: updates of each student, whatever its recipe.
        student_rows: rows of a student's update.
        learning_rate: of the students.
        cached: answers of each expert in the cache.
        items: held-out problems a domain.
        seeds: number of seeds for the students.
        base: model directory; left out, SmolLM2-135M-Instruct is fetched.
    """

    output_dir: Path
    expert_steps: int = 250
    expert_rows: int = 16
    expert_problems: int = 4000
    student_steps: int = 150
    student_rows: int = 24
    learning_rate: float = 1e-3
    cached: int = 600
    items: int = 100
    seeds: int = 3
    base: Path | None = None


def main(options: Options) -> None:
    """Do what is not done yet, and write the report after every student."""
    root = options.output_dir
    root.mkdir(parents=True, exist_ok=True)
    base = options.base or Path(prepare_teacher(root / "models").ref)
    tokenizer = load_tokenizer(base)
    examined = {domain: held_out(domain, options.items) for domain in DOMAINS}
    results = Results(root / "results.json")
    results.once("base", lambda: accuracy(load_base(base), tokenizer, examined))

    adapters = {domain: root / "experts" / domain for domain in DOMAINS}
    for domain, directory in adapters.items():
        if not (directory / "adapter_model.safetensors").exists():
            problems = training(domain, options.expert_problems, 0, examined[domain])
            fit_expert(base, problems, directory, steps=options.expert_steps, rows=options.expert_rows, seed=0)
    for domain, directory in adapters.items():

        def examine(directory=directory) -> dict[str, float]:
            return accuracy(PeftModel.from_pretrained(load_base(base), directory), tokenizer, examined)

        results.once(f"expert: {domain}", examine)
    results.once("averaged adapters", lambda: accuracy(averaged(base, adapters), tokenizer, examined))

    caches = {domain: root / "caches" / domain for domain in DOMAINS}
    for domain, directory in caches.items():
        cache_answers(base, adapters[domain], training(domain, options.cached, 1, examined[domain]), directory)

    for seed in range(options.seeds):
        prompts = mixed(2 * options.student_steps * options.student_rows // len(DOMAINS), seed, examined)
        for recipe in RECIPES:

            def train(recipe=recipe, prompts=prompts, seed=seed) -> dict[str, float]:
                student = train_student(
                    recipe,
                    base,
                    adapters,
                    list(caches.values()),
                    prompts,
                    root / "students" / f"{recipe.name}-{seed}",
                    steps=options.student_steps,
                    rows=options.student_rows,
                    learning_rate=options.learning_rate,
                    seed=seed,
                )
                return accuracy(student, tokenizer, examined)

            results.once(f"{recipe.name} / seed {seed}", train)
            write_report(results.found, root)


def mixed(count: int, seed: int, examined: dict[str, list[Problem]]) -> list[Problem]:
    """Return ``count`` problems of each domain in random order."""
    problems = [p for domain in DOMAINS for p in training(domain, count, 100 + seed, examined[domain])]
    random.Random(seed).shuffle(problems)
    return problems


class Results:
    """Accuracies by name, on disk after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, measure: Any) -> None:
        """Measure ``name`` unless it has been."""
        if name not in self.found:
            self.found[name] = measure()
            self.path.write_text(json.dumps(self.found, indent=1))
        print(f"{name}: {self.found[name]}", flush=True)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
