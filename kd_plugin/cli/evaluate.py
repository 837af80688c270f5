"""``kd-plugin evaluate``: how good is a model on your own questions, and is it better than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_plugin.cli.text import make_writer
from kd_plugin.errors import UsageError
from kd_plugin.settings import option, settings

_DESCRIPTION = """\
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


def main(argv: Sequence[str]) -> int:
    """Run the command with ``argv`` and return its exit code."""
    from kd_plugin.cli.parsing import as_yaml, parse_settings

    parsed = parse_settings(EvaluateConfig, argv, command="evaluate", description=_DESCRIPTION)
    config = parsed.settings
    if parsed.print_only:
        print(as_yaml(config))
        return 0
    for name in ("model", "tasks", "output_dir"):
        if not getattr(config, name):
            raise UsageError(f"{name} is not set. Give --{name}, or `{name}:` in the --config file.")
    from kd_plugin.evaluation import compare, evaluate, load_evaluation, load_tasks
    from kd_plugin.evaluation.contamination import find_contaminated, without, write_contaminated
    from kd_plugin.evaluation.page import write_page
    from kd_plugin.inputs import load_rows

    baseline = None if config.baseline is None else load_evaluation(config.baseline)
    known = {}
    if config.training:
        known = find_contaminated(load_tasks(config.tasks), (row for one in config.training for row in load_rows(one)))
    writer = make_writer(config.model, _name(config), config, {}, "model")
    found = evaluate(writer, config.tasks, str(config.output_dir))
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
