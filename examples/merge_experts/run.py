"""Merge three experts into one student: ``python -m examples.merge_experts.run --output_dir out``.

Fits a LoRA expert to each of three kinds of problems, then trains one student with the three as its panel, by several
recipes and seeds, and writes ``results.json``, ``results.md`` and ``results.png``. What is finished is not done again,
so an interrupted run goes on with the same command.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from peft import PeftModel

from examples.merge_experts.experts import accuracy, fit_expert, load_base, load_tokenizer
from examples.merge_experts.report import write_report
from examples.merge_experts.students import RECIPES, Recipe, averaged, cache_answers, train_student
from examples.merge_experts.tasks import DOMAINS, Problem, held_out, training
from examples.side_by_side import Results, workers
from kd_plugin.demo.model import prepare_teacher

Accuracy = dict[str, float]


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        output_dir: everything is written here.
        expert_steps: updates of each expert.
        expert_rows: rows of an expert's update.
        expert_problems: distinct problems that an expert sees.
        student_steps: updates of each student, whatever its recipe.
        student_rows: rows of a student's update, a multiple of the number of domains.
        learning_rate: of the students.
        items: held-out problems a domain.
        seeds: number of seeds for the students.
        workers: models that are trained side by side, each with its share of the cores.
        base: model directory; left out, SmolLM2-135M-Instruct is fetched.
    """

    output_dir: Path
    expert_steps: int = 60
    expert_rows: int = 16
    expert_problems: int = 4000
    student_steps: int = 60
    student_rows: int = 24
    learning_rate: float = 1e-3
    items: int = 200
    seeds: int = 3
    workers: int = 2
    base: Path | None = None


def adapters_of(options: Options) -> dict[str, Path]:
    """Return where the experts are."""
    return {domain: options.output_dir / "experts" / domain for domain in DOMAINS}


def caches_of(options: Options) -> dict[str, Path]:
    """Return where the experts' answers are."""
    return {domain: options.output_dir / "caches" / domain for domain in DOMAINS}


def examination(options: Options) -> dict[str, list[Problem]]:
    """Return the held-out problems."""
    return {domain: held_out(domain, options.items) for domain in DOMAINS}


def shares(options: Options) -> dict[str, int]:
    """Return how many problems of each domain a student's training takes."""
    rows = (options.student_steps + 1) * options.student_rows
    return {domain: 1 + round(rows * one.share) for domain, one in DOMAINS.items()}


def main(options: Options) -> None:
    """Do what is not done yet, and write the report after every student."""
    if options.student_rows % len(DOMAINS):
        raise SystemExit(f"--student_rows is {options.student_rows}; it must be a multiple of {len(DOMAINS)}.")
    root = options.output_dir
    root.mkdir(parents=True, exist_ok=True)
    options = replace(options, base=options.base or Path(prepare_teacher(root / "models").ref))
    results = Results(root / "results.json")
    with workers(options.workers) as pool:
        experts = {f"expert: {domain}": partial(expert, options, domain) for domain in DOMAINS}
        results.fill(pool, {"base": partial(untrained, options), **experts})
        results.fill(pool, {"averaged adapters": partial(average, options)})
        list(pool.map(partial(cache, options), DOMAINS))
        students = {
            f"{recipe.name} / seed {seed}": partial(student, options, recipe, seed)
            for recipe in RECIPES
            for seed in range(options.seeds)
        }
        order = ["base", *experts, "averaged adapters", *students]
        results.fill(pool, students, after=lambda found: write_report({n: found[n] for n in order if n in found}, root))


def untrained(options: Options) -> Accuracy:
    """Examine the base."""
    return _examine(options, load_base(options.base))


def expert(options: Options, domain: str) -> Accuracy:
    """Fit the expert of a domain, unless it is there, and examine it."""
    directory = adapters_of(options)[domain]
    if not (directory / "adapter_model.safetensors").exists():
        problems = training(domain, options.expert_problems, 0, examination(options)[domain])
        fit_expert(options.base, problems, directory, steps=options.expert_steps, rows=options.expert_rows, seed=0)
    return _examine(options, PeftModel.from_pretrained(load_base(options.base), directory))


def average(options: Options) -> Accuracy:
    """Examine the plain average of the experts."""
    return _examine(options, averaged(options.base, adapters_of(options)))


def cache(options: Options, domain: str) -> None:
    """Let an expert answer as many problems as a student's training takes of its domain."""
    problems = training(domain, shares(options)[domain], 1, examination(options)[domain])
    cache_answers(options.base, adapters_of(options)[domain], problems, caches_of(options)[domain])


def student(options: Options, recipe: Recipe, seed: int) -> Accuracy:
    """Train a student and examine it."""
    examined = examination(options)
    problems = [
        p for domain in DOMAINS for p in training(domain, shares(options)[domain], 100 + seed, examined[domain])
    ]
    random.Random(seed).shuffle(problems)
    trained = train_student(
        recipe,
        options.base,
        adapters_of(options),
        list(caches_of(options).values()),
        problems,
        options.output_dir / "students" / f"{recipe.name}-{seed}",
        steps=options.student_steps,
        rows=options.student_rows,
        learning_rate=options.learning_rate,
        seed=seed,
    )
    return _examine(options, trained)


def _examine(options: Options, model: Any) -> Accuracy:
    return accuracy(model, load_tokenizer(options.base), examination(options))


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
