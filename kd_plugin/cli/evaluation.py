"""``kd-plugin evaluate``, ``pilot``, ``ladder``: how good is a student, which method is better, which size will do."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugin.cli.text import make_writer
from kd_plugin.settings import option, settings

_EVALUATE = """\
Ask a model every question of your own set, several times each, verify the answers, and say how good it is and how sure
that is: pass@1 with a 95% interval, pass@k, and with --baseline the difference from another model on the same
questions. All answers are kept, as responses.parquet and as a page to read what went wrong. Run the same command again
to go on after an interruption.

  kd-plugin evaluate --model outputs/student --tasks tasks.yaml --output_dir eval/student

tasks.yaml has defaults and one or several tasks, each with what `rows` and so on below say:

  sampling_temperature: 0.6
  tasks:
    mine: {rows: questions.jsonl, verify: math_verify, completions: 8}

Exit codes: 0 done, 1 failed (answers are kept), 2 a setting is wrong, 130 interrupted.
"""
_PILOT = """\
Train the student briefly by each method, at equal cost, and say which is best for your task: offline KD on what the
teacher generated, offline KD on what the student generated, the panel, a warm-up and then the panel, and correction by
text where a teacher has signal: text. Learning rates are scanned for each of them alike. It ends with accuracy against
cost as a table and as report.html, says which differences are real, and writes winner.yaml for `kd-plugin run`. Run the
same command again to go on after an interruption.

example, pilot.yaml:
    output_dir: pilot
    student: STUDENT
    teachers: {expert: {model: TEACHER}}
    data: {dataset: rows.jsonl}            # rows with prompt
    tasks: tasks.yaml                      # your own questions, as `kd-plugin evaluate` takes them
    unit: flops                            # or seconds, or money with price_per_hour
    budget: 1.0e+15                        # of each run: the student's and the teachers' operations
    learning_rates: [1.0e-5, 3.0e-5, 1.0e-4]
    seeds: [0, 1, 2]
    capture: {k: 64, max_new_tokens: 256}  # settings of `kd-plugin capture`, and so on
    offline: {per_device_train_batch_size: 8}
    panel: {max_completion_length: 256}

  kd-plugin pilot --config pilot.yaml --dry-run
  kd-plugin pilot --config pilot.yaml

Exit codes: 0 done, 1 refused or a run failed (what is done is kept), 2 a setting is wrong, 130 interrupted.
"""
_LADDER = """\
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
EXIT_NONE = 3  # no rung of a ladder meets the bar


@settings
class EvaluateConfig:
    """Settings of an evaluation."""

    model: Any = option(
        default=None,
        help="A directory or hub id; or a mapping: model, batch_size, dtype, device of one here, or url, model, "
        "max_concurrency and so on of an OpenAI-compatible server.",
    )
    tasks: Any = option(default=None, help="YAML file with the tasks; in a configuration also the mapping itself.")
    output_dir: str | None = option(default=None, help="Where answers and results are kept.")
    baseline: str | None = option(default=None, help="output_dir of another model's evaluation, to compare with.")
    training: list[str] | None = option(
        default=None,
        help="Files or hub ids of what the model was trained on: questions that are in there, wholly or nearly, are "
        "counted and listed, and the result without them is given too.",
    )
    name: str = option(default="model", help="How results call the model; left out, by its directory or hub id.")
    dtype: str = option(default="auto", help="dtype of a model here.")
    device: str | None = option(
        default=None, help="Device of a model here; left out, an accelerator where there is one."
    )


def evaluate(argv: Sequence[str]) -> int:
    """Run ``kd-plugin evaluate`` with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import parse_settings, require_set

    parsed = parse_settings(EvaluateConfig, argv, command="evaluate", description=_EVALUATE)
    config = parsed.settings
    if parsed.shown():
        return 0
    require_set(config, ("model", "tasks", "output_dir"))
    from kd_plugin import evaluation
    from kd_plugin.evaluation import compare, load_evaluation, load_tasks
    from kd_plugin.evaluation.contamination import find_contaminated, without, write_contaminated
    from kd_plugin.evaluation.page import write_page
    from kd_plugin.inputs import load_rows

    baseline = None if config.baseline is None else load_evaluation(config.baseline)
    known = {}
    if config.training:
        known = find_contaminated(load_tasks(config.tasks), (row for one in config.training for row in load_rows(one)))
    writer = make_writer(config.model, _name(config), config, {}, "model")
    found = evaluation.evaluate(writer, config.tasks, str(config.output_dir))
    clean = without(found, known)
    differences = {} if baseline is None else compare(found, baseline)
    for name, result in found.results.items():
        most = max(result.pass_at)
        words = [f"{name}: pass@1 {result.accuracy}"]
        if most > 1:
            words.append(f"pass@{most} {result.pass_at[most].value:.3f}")
        words.append(f"{result.questions} questions, {result.answers} answers each")
        if result.unfinished:
            words.append(f"{result.unfinished:.0%} unfinished")
        print(", ".join(words))
        if known:
            among = f"  {len(known[name])} of {result.questions} questions are in the training data"
            print(among + (f"; without them pass@1 {clean[name].accuracy}" if name in clean else ""))
        if name in differences:
            gap = differences[name]
            sure = "a real difference" if gap.low > 0 or gap.high < 0 else "no difference that is sure"
            print(f"  less {baseline.model}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {sure}")  # type: ignore[union-attr]
    if any(known.values()):
        print(f"Questions that were trained on: {write_contaminated(found.path, known)}")
    print(f"Answers to read: {write_page(found, differences)}")
    return 0


def _name(config: EvaluateConfig) -> str:
    if config.name != "model":
        return config.name
    given = config.model
    named = given.get("model", given.get("url")) if isinstance(given, Mapping) else given
    return str(named).rstrip("/").rpartition("/")[2] or "model"


def pilot(argv: Sequence[str]) -> int:
    """Run ``kd-plugin pilot`` with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import parse_settings, require_set
    from kd_plugin.evaluation.pilot.settings import PilotConfig, State

    flags = {"dry_run": "Print the methods, the number of runs and the verdict on all terms; run nothing."}
    parsed = parse_settings(PilotConfig, argv, command="pilot", description=_PILOT, flags=flags)
    config = parsed.settings
    if parsed.shown():
        return 0
    require_set(config, ("output_dir", "student", "teachers", "data", "tasks", "budget"))
    from kd_plugin.cli.recipe.command import WrittenRecipes
    from kd_plugin.evaluation.pilot.report import write_report
    from kd_plugin.evaluation.pilot.run import Pilot
    from kd_plugin.evaluation.tasks import load_tasks

    for task in load_tasks(config.tasks):
        _ = task.plan  # what is wrong with the questions shows before anything is trained
    pilot = Pilot(config, State.of(config), WrittenRecipes())
    print(pilot.plan(), flush=True)
    refused = pilot.refused()
    if refused or "dry_run" in parsed.flags:
        return int(refused)
    outcome = pilot.run(_say)
    print(write_report(outcome, Path(config.output_dir)))
    return 0


def ladder(argv: Sequence[str]) -> int:
    """Run ``kd-plugin ladder`` with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import naming, parse_settings, require_set
    from kd_plugin.evaluation.ladder import Ladder, LadderConfig

    flags = {"dry_run": "Print size, plan, cost and terms of every rung; train nothing."}
    parsed = parse_settings(LadderConfig, argv, command="ladder", description=_LADDER, flags=flags)
    config = parsed.settings
    if parsed.shown():
        return 0
    require_set(config, ("output_dir", "rungs", "recipe", "tasks", "bar"))
    from kd_plugin.cli.recipe.command import WrittenRecipes

    ladder = Ladder(config, WrittenRecipes())
    with naming(config.recipe):
        forbidden = ladder.forbidden()
    sys.stdout.flush()
    if forbidden and not config.skip_blocked:
        print(
            f"kd-plugin ladder: the terms forbid {', '.join(forbidden)}, as said above. Nothing was trained. Leave "
            "them out, declare what is missing, or set skip_blocked: true to climb past them.",
            file=sys.stderr,
        )
        return 1
    if "dry_run" in parsed.flags:
        return 0
    holds, said = ladder.run(forbidden, _say)
    print(said)
    return 0 if holds else EXIT_NONE


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
