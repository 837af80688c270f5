"""The demo from its first line to its last, and what it shows at its end."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_plugin.demo import stages
from kd_plugin.demo.model import PreparedTeacher, prepare_teacher
from kd_plugin.demo.prompts import GENERAL, MATH, Question
from kd_plugin.demo.stages import ARITHMETIC, CACHE, MODELS, OFFLINE, PANEL, QUESTIONS, SPECIALIST, START, DemoParts
from kd_plugin.demo.state import DemoConfig, DemoState, require_writable

_SAMPLE_WIDTH = 76
_POINTS = {"before": START, "after offline KD": OFFLINE, "after the panel": PANEL}


def show_results(console: Console, measured: dict[str, dict[str, Any]]) -> None:
    """Print the table of held-out numbers: one column a point of the demo."""
    table = Table(title="Held-out questions", title_justify="left", title_style="bold")
    table.add_column("")
    for point in measured:
        table.add_column(point, justify="right")
    for domain in (GENERAL, MATH):
        values = [f"{m['kl'][domain]:.3f}" for m in measured.values()]
        table.add_row(f"KL to the {domain} teacher (nats/token)", *values)
    console.print(table)
    console.print(
        "KL(teacher || student) on the teachers' own answers to questions that were never trained on. The panel\n"
        "minimises the reverse KL, on the student's answers: it moves towards the teacher of each domain.",
        highlight=False,
    )


def show_samples(console: Console, asked: dict[str, Question], measured: dict[str, dict[str, Any]]) -> None:
    """Print what the student generated at each point, to one question of each domain."""
    for domain, question in asked.items():
        console.print(f"\n[bold]{escape(question.text)}[/bold] [dim]({domain})[/dim]")
        width = max(map(len, measured))
        for point, values in measured.items():
            text = " ".join(values["samples"][domain].split())
            text = text if len(text) <= _SAMPLE_WIDTH else text[: _SAMPLE_WIDTH - 3] + "..."
            console.print(f"  {point:<{width}}  {escape(text) or '(nothing)'}", highlight=False)


def show_next(console: Console, directory: Path, seconds: float, peak_gigabytes: float) -> None:
    """Say where the files are, and how to do the same on one's own data."""
    console.print(
        f"""
[bold]Files[/bold]
  {directory / CACHE}     the teacher cache: Parquet, readable with `datasets`
  {directory / OFFLINE}   the student after offline KD
  {directory / PANEL}     the student after the panel, with lineage.json, NOTICE and LICENSES/
  See who taught it, under which terms:  kd-plugin lineage show {directory / PANEL}

[bold]The same on your own data[/bold]
  kd-plugin run recipe.yaml      one file from rows to a checked student; docs/recipe.md has one to start from
  in Python:
  cache = capture(dataset, LocalTeacher("teacher"), "cache")                       # once
  OfflineKDTrainer(model="student", teacher_cache=cache, args=..., train_dataset=dataset).train()
  TeacherPanelTrainer(model="student", teacher_models={{"math": "a", "general": "b"}}, args=...,
                      train_dataset=dataset).train()                               # columns: prompt, teacher_id
  docs/quickstart.md has both in full. `kd-plugin demo --config` prints this demo's settings.

Took {seconds:.0f} s; peak memory {peak_gigabytes:.1f} GB.""",
        highlight=False,
    )


def run_demo(config: DemoConfig, console: Console, *, fresh: bool = False) -> int:
    """Run what is not done yet, and show the result; 0 when the lineage of every checkpoint verifies.

    Args:
        config: the settings.
        console: where everything is shown.
        fresh: delete what an earlier demo wrote in the same directory, and start again.
    """
    started = time.monotonic()
    require_writable(Path(config.output_dir))
    _be_quiet()
    _use_threads(config.threads)
    with DemoState(config, fresh=fresh) as state, _said_once():
        if state.resumed:
            console.print(f"Going on in {state.directory}; --fresh starts again.", highlight=False)
        stage = _open(config, state, console)
        console.print(f"[bold]1[/bold] license gate: {stages.gate(stage)}", highlight=False)
        _do(stage, "specialist", "2 a second teacher, fine-tuned on arithmetic (SFTTrainer)", stages.train_specialist)
        _do(stage, "student", "3 the student, cut from the teacher", stages.make_student)
        _do(stage, "answers", "4 the teachers answer", stages.write_answers)
        _do(stage, "capture", "5 capture into a teacher cache", stages.fill_cache)
        _do(stage, "offline", "6 offline KD (OfflineKDTrainer)", stages.train_offline)
        _do(stage, "panel", "7 on-policy panel of two teachers (TeacherPanelTrainer)", stages.train_panel)
        measured = {
            point: _do(stage, f"measured {name}", f"8 measure the student {point}", partial(stages.measure, name=name))
            for point, name in _POINTS.items()
        }
        code = _verify(stage)
        show_results(console, measured)
        show_samples(console, stages.sample_questions(config), measured)
        show_next(console, state.directory, time.monotonic() - started, _peak_gigabytes())
    return code


def _open(config: DemoConfig, state: DemoState, console: Console) -> DemoParts:
    """Find the teacher, and load the tokenizer that it shares with the student."""
    from transformers import AutoTokenizer

    if config.teacher:
        teacher = PreparedTeacher(config.teacher, Path(config.teacher).name, f"given as {config.teacher}")
    else:
        models = Path(config.model_cache) if config.model_cache else state.claim(MODELS, survives=True)
        teacher = prepare_teacher(models, lambda text: console.print(f"  {text}", highlight=False))
    console.print(f"[bold]teacher[/bold] {teacher.origin}", highlight=False)
    return DemoParts(config, state, console, teacher, AutoTokenizer.from_pretrained(teacher.ref))


def _do(stage: DemoParts, key: str, label: str, work: Callable[[DemoParts], dict[str, Any]]) -> dict[str, Any]:
    """Do a stage unless it is done, and say what came of it."""
    number, text = label.split(" ", 1)
    result = stage.state.result(key)
    if result is None:
        stage.console.print(f"[bold]{number}[/bold] {text} ...", highlight=False)
        started = time.monotonic()
        result = work(stage)
        stage.state.finish(key, result)
        stage.console.print(f"  {_in_words(result)}{time.monotonic() - started:.0f} s", highlight=False)
    else:
        stage.console.print(f"[bold]{number}[/bold] {text}: done before", highlight=False)
    return result


def _in_words(result: dict[str, Any]) -> str:
    """Write a stage's numbers as ``first loss 3.2, last loss 0.9, ``; nested results are shown at the end."""
    words = [
        f"{name.replace('_', ' ')} {value:.3g}, " if isinstance(value, float) else f"{value} {name}, "
        for name, value in result.items()
        if isinstance(value, int | float)
    ]
    return "".join(words)


def _verify(stage: DemoParts) -> int:
    """Verify the lineage of every checkpoint that the demo wrote; return the worst exit code."""
    from kd_plugin.lineage import verify

    stage.console.print("[bold]9[/bold] verify the lineage of each checkpoint", highlight=False)
    worst = 0
    for name in (SPECIALIST, START, OFFLINE, PANEL):
        found = verify(stage.path(name))
        worst = max(worst, found.exit_code)
        stage.console.print(f"  {name}: {'verified' if found.exit_code == 0 else '; '.join(map(str, found.problems))}")
    return worst


def _be_quiet() -> None:
    """Keep other libraries' progress bars and hints out of the demo's own lines."""
    import datasets
    import transformers

    # Settings that transformers 5.23 renames while TRL 1.16 still uses the old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def _said_once() -> Iterator[None]:
    """Log each finding on the terms once, since five runs learn from the same questions; none on these questions.

    What is declared of them the package says itself; the gate's line tells it, and a user can do nothing about it.
    """
    said: set[str] = set()

    def is_new(line: logging.LogRecord) -> bool:
        words = line.getMessage()
        new = words not in said and not any(bundled["repo"] in words for bundled in (ARITHMETIC, QUESTIONS))
        said.add(words)
        return new

    lines = logging.getLogger("kd_plugin.lineage.run")
    lines.addFilter(is_new)
    try:
        yield
    finally:
        lines.removeFilter(is_new)


def _use_threads(threads: int) -> None:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or allowed)


def _peak_gigabytes() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere
