"""``kd-plugin run RECIPE``, and the runs of recipes that a pilot or a ladder makes.

Each stage is a command of this package with a configuration that is written beside the results, so that it can also be
run by hand: a capture for each teacher, then offline KD, then the panel, then an evaluation, then ``lineage verify``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kd_plugin.cli.parsing import for_the_user, parse_settings
from kd_plugin.cli.recipe.sections import Recipe, checked, stages_of, student_of
from kd_plugin.cli.recipe.stages import Stages
from kd_plugin.errors import KDError, UsageError
from kd_plugin.evaluation.recipes import Done

_DESCRIPTION = """\
Do all of a distillation that one YAML file describes: capture each teacher, train offline, train with the panel,
evaluate the student and verify its lineage. The plan, the memory that it takes and the verdict on all terms come first.
What is done is skipped, what was interrupted goes on. Each stage's own configuration lies in output_dir/recipe, and
runs by hand with the same result.

example, recipe.yaml:
    output_dir: work
    student: {model_name_or_path: STUDENT}
    teachers:
      math: {model: TEACHER}
    data: {dataset: rows.jsonl}         # rows with prompt and completion; or datasets: [...], a mixture
    capture: {k: 64}                    # settings of `kd-plugin capture`
    offline: {learning_rate: 2.0e-5}    # settings of `kd-plugin offline`
    panel: {max_completion_length: 256} # settings of `kd-plugin panel`
    evaluate: {tasks: tasks.yaml}       # settings of `kd-plugin evaluate`
    lineage: {use: {commercial: true}}
    launch: {processes: 8}

  kd-plugin run recipe.yaml --dry-run
  kd-plugin run recipe.yaml

With `targets: text` in capture all teachers write into one dataset, on which the student trains by cross-entropy; on
the panel their servers then correct by text.

A section that is left out is a stage that is left out; capture belongs to offline. Exit codes: 0 done, 1 refused or a
stage failed, 2 wrong usage, 130 interrupted.
"""


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin run ARGV`` and return its exit code."""
    words = ["--config", *argv] if argv and not argv[0].startswith("-") else list(argv)
    flags = {"dry_run": "Print the plan and the verdict on all terms; run nothing."}
    parsed = parse_settings(Recipe, words, command="run", description=_DESCRIPTION, flags=flags)
    from kd_plugin.cli.recipe.plan import memory_lines, print_verdict

    recipe = parsed.settings
    given = parsed.file
    if given is None:
        raise UsageError("no recipe is named. Give its YAML file: kd-plugin run recipe.yaml", "kd-plugin run")
    recipe = checked(recipe, given)
    stages = Stages(recipe.output_dir, stages_of(recipe, given), recipe.cache_dir)
    done = stages.done()
    print(f"{given.path} -> {recipe.output_dir}")
    for stage in stages.stages:
        print(f"  {stage.name:<24}{'done before' if done[stage.name] else 'to do':<14}{stage.result}")
    if not all(done.values()):
        gpus = int((recipe.launch or {}).get("processes", 1))
        left = [stage for stage in stages.stages if not done[stage.name]]
        print(*memory_lines(left, student_of(recipe), gpus), sep="\n")
    refused = print_verdict(recipe)
    if refused or "dry_run" in parsed.flags:
        return int(refused)
    stages.write()
    for stage in stages.stages:
        if done[stage.name]:
            continue
        print(f"\n== {stage.name}: kd-plugin {stage.command} --config {stages.config_of(stage)}", flush=True)
        code = stages.run(stage)
        if code:
            print(f"{stage.name} ended with exit code {code}. Run the same command again to go on.", file=sys.stderr)
            return code
    if stages.student is None:
        return 0
    from kd_plugin.cli.lineage import main as lineage

    print(f"\n== kd-plugin lineage verify {stages.student}", flush=True)
    return lineage(["verify", str(stages.student)])


class WrittenRecipes:
    """Recipes of a pilot or a ladder, each in its own directory: :class:`~kd_plugin.evaluation.recipes.Recipes`.

    One that says nothing of how it is launched is run in this process where no GPU is, which saves the imports.
    """

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a recipe with a setting that is wrong."""
        _written(recipe)

    def refused(self, recipe: Mapping[str, Any]) -> bool:
        """Print what the terms of a recipe allow; return whether its training would be refused."""
        from kd_plugin.cli.recipe.plan import print_verdict

        return print_verdict(_written(recipe)[0])

    def run(self, recipe: Mapping[str, Any], log: Path | None = None) -> list[Done]:
        """Run what is left of a recipe, and return its stages; see the protocol."""
        import torch

        settings, stages = _written(recipe)
        here = settings.launch is None and not torch.cuda.is_available()
        name, done = Path(settings.output_dir).name, stages.done()
        if not all(done.values()):
            stages.write()
        for stage in stages.stages:
            if done[stage.name]:
                continue
            if log is None:
                print(f"== {name}: {stage.name}", file=sys.stderr, flush=True)
            with for_the_user(stages.config_of(stage)), contextlib.nullcontext() if log is None else _printed_to(log):
                code = stages.run(stage, here=here)
            if code:
                failed = f"{name}: {stage.name} ended with exit code {code}"
                if log is None:
                    raise KDError(f"{failed}. Run the same command to go on.")
                last = " ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:])
                raise KDError(f"{failed}: {last[-600:]} All of it: {log}")
        return [Done(one.command, one.config, one.result, stages.seconds(one)) for one in stages.stages]


def _written(content: Mapping[str, Any]) -> tuple[Recipe, Stages]:
    """Write a recipe into its directory, and return it with its stages.

    Raises:
        ConfigError: a setting is wrong.
    """
    place = Path(content["output_dir"])
    place.mkdir(parents=True, exist_ok=True)
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
    with for_the_user(path):
        parsed = parse_settings(Recipe, ["--config", str(path)], command="run", description="")
        assert parsed.file is not None
        recipe = checked(parsed.settings, parsed.file)
        return recipe, Stages(recipe.output_dir, stages_of(recipe, parsed.file), recipe.cache_dir)


@contextlib.contextmanager
def _printed_to(log: Path) -> Iterator[None]:
    """Write what this process and its children print into a file, whichever way they print."""
    with log.open("a", encoding="utf-8") as file:
        kept = [os.dup(number) for number in (1, 2)]
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            file.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
