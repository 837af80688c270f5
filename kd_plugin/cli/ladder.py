"""``kd-plugin ladder``: the smallest student that is good enough, found from below."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, KDError
from kd_plugin.settings import option, settings

_DESCRIPTION = """\
Train the smallest student, evaluate it on your own questions, and climb to the next one only where it misses your bar.
Size, plan and cost of every rung, and the verdict on its terms, come before the first one is trained: a licence that
forbids a later rung shows at once. It stops at the first rung whose lower confidence bound meets the bar. Captures,
panel and data stay from rung to rung. Run the same command again to go on after an interruption.

example, ladder.yaml:
    output_dir: ladder
    rungs: [SMALL, {student: LARGE, offline: {learning_rate: 1.0e-5}}]
    recipe: pilot/winner.yaml          # or the mapping itself; its student and output_dir are those of the rung
    tasks: tasks.yaml                  # your own questions, as `kd-plugin evaluate` takes them
    bar: 0.8                           # of every task; or a mapping from tasks
    plan: {gpus_per_node: 1, gpu_hour: 2.5, rows: 20000}   # settings of `kd-plugin plan`

  kd-plugin ladder --config ladder.yaml --dry-run
  kd-plugin ladder --config ladder.yaml

Exit codes: 0 a rung meets the bar, 3 none does, 1 refused or a stage failed (what is done is kept), 2 a setting is
wrong, 130 interrupted.
"""
EXIT_NONE = 3


@settings
class LadderConfig:
    """Settings of a ladder.

    Raises:
        ConfigError: a bar that is no accuracy.
    """

    output_dir: str = option(default="", help="Directory of all rungs and of the report.")
    rungs: list[Any] | None = option(
        default=None,
        help="Students from small to large: a path or hub id; or a mapping with student, and name, offline, panel or "
        "lineage in the place of the recipe's.",
    )
    recipe: dict[str, Any] | str = option(
        default="", help="How each rung is trained: a recipe of `kd-plugin run`, such as a pilot's winner.yaml."
    )
    tasks: dict[str, Any] | str = option(
        default="", help="Your own questions: a file of tasks as `kd-plugin evaluate` takes it, or its mapping."
    )
    bar: dict[str, float] | float | None = option(
        default=None, help="Accuracy that is asked for: one number for every task, or a mapping from tasks to numbers."
    )
    plan: dict[str, Any] | None = option(
        default=None, help="Machines and rows of the plan that is shown for each rung: settings of `kd-plugin plan`."
    )
    price_per_hour: float = option(default=0.0, help="Of this machine, by which the report counts what was spent.")
    skip_blocked: bool = option(
        default=False, help="Climb past rungs that the terms forbid, in the place of stopping before the first."
    )

    def __post_init__(self) -> None:
        bars = self.bar.values() if isinstance(self.bar, Mapping) else [self.bar]
        for one in bars:
            if one is not None and not 0 < one <= 1:
                raise ConfigError(f"bar is {one}; expected an accuracy above 0 and at most 1.")


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import as_yaml, parse_settings, require_set

    flags = {"dry_run": "Print size, plan, cost and terms of every rung; train nothing."}
    parsed = parse_settings(LadderConfig, argv, command="ladder", description=_DESCRIPTION, flags=flags)
    config = parsed.settings
    if parsed.print_only:
        print(as_yaml(config))
        return 0
    require_set(config, ("output_dir", "rungs", "recipe", "tasks", "bar"), "ladder")
    return run(config, dry="dry_run" in parsed.flags)


def run(config: LadderConfig, *, dry: bool = False) -> int:
    """Climb, and return the exit code.

    Args:
        config: its settings.
        dry: whether to stop before the first rung is trained.
    """
    import torch

    from kd_plugin.cli.ladder_runs import Rung, climb, plan_line, rungs_of, write_report
    from kd_plugin.cli.recipe_terms import print_verdict
    from kd_plugin.evaluation import Evaluation, evaluate, load_tasks
    from kd_plugin.inputs import read_yaml
    from kd_plugin.text import LocalWriter

    recipe = config.recipe if isinstance(config.recipe, Mapping) else read_yaml(config.recipe)
    tasks = load_tasks(config.tasks)
    bars = _bars(config.bar, [task.name for task in tasks])
    for task in tasks:
        _ = task.plan  # what is wrong with the questions shows before anything is trained
    place = Path(config.output_dir)
    rungs, blocked = rungs_of(config.rungs or [], recipe, place), []
    for rung in rungs:
        print(plan_line(rung, config.plan or {}))
        made, _ = rung.stages()
        if print_verdict(made):
            blocked.append(rung.name)
    sys.stdout.flush()
    if blocked and not config.skip_blocked:
        print(
            f"kd-plugin ladder: the terms forbid {', '.join(blocked)}, as said above. Nothing was trained. Leave them "
            "out, declare what is missing, or set skip_blocked: true to climb past them.",
            file=sys.stderr,
        )
        return 1
    if dry:
        return 0
    able = [rung for rung in rungs if rung.name not in blocked]

    def train(rung: Rung) -> float:
        made, stages = rung.stages()
        done = stages.done()
        left = [stage for stage in stages.stages if not done[stage.name]]
        if left:
            stages.write()
        for stage in left:
            print(f"== {rung.name}: {stage.name}", file=sys.stderr, flush=True)
            code = stages.run(stage, here=made.launch is None and not torch.cuda.is_available())
            if code:
                raise KDError(f"{rung.name}: {stage.name} ended with exit code {code}. Run the same command to go on.")
        shared = rung is not able[0] and "cache_dir" in rung.recipe  # the first rung has paid for captures
        return sum(stages.seconds(one) for one in stages.stages if one.command != "capture" or not shared)

    def measure(rung: Rung) -> Evaluation:
        student = rung.stages()[1].student
        return evaluate(LocalWriter(str(student), name=rung.name), config.tasks, rung.place / "evaluation")

    if not able:
        raise KDError("The terms forbid every rung.")
    climbed = climb(able, bars, train, measure, lambda words: print(words, file=sys.stderr, flush=True))
    print(write_report(climbed, able, bars, config.price_per_hour, place))
    return 0 if climbed[-1].holds else EXIT_NONE


def _bars(given: Any, names: Sequence[str]) -> dict[str, float]:
    """Return by task the accuracy that is asked for.

    Raises:
        ConfigError: a bar of a task that is not there.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, float(given))
    for name in given:
        if name not in names:
            raise ConfigError(f"bar: there is no task {name!r}; expected one of {', '.join(names)}.")
    return {str(name): float(value) for name, value in given.items()}
