"""What the demo shows at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_plugin.demo.prompts import GENERAL, MATH, Question
from kd_plugin.demo.stages import CACHE, OFFLINE, PANEL

_SAMPLE_WIDTH = 76


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
    """Print what the student wrote at each point, to one question of each domain."""
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
  cache = capture(dataset, LocalTeacher("teacher"), "cache")                       # once
  OfflineKDTrainer(model="student", teacher_cache=cache, args=..., train_dataset=dataset).train()
  TeacherPanelTrainer(model="student", teacher_models={{"math": "a", "general": "b"}}, args=...,
                      train_dataset=dataset).train()                               # columns: prompt, teacher_id
  docs/quickstart.md has both in full. `kd-plugin demo --config` prints this demo's settings.

Took {seconds:.0f} s; peak memory {peak_gigabytes:.1f} GB.""",
        highlight=False,
    )
