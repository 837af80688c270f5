"""What the terms of a recipe's student, teachers and rows allow, said before anything is run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from kd_plugin.cli.capture import CaptureConfig, make_teacher, rows_of
from kd_plugin.cli.recipe import Recipe, data_of, declarations, is_text, student_of, teacher_of, writers_of
from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage.sources import Source


def print_verdict(recipe: Recipe) -> bool:
    """Print what the terms of student, teachers and rows allow; return whether training would be refused."""
    from rich.console import Console

    from kd_plugin.lineage import RunLineage
    from kd_plugin.lineage.data import dataset_sources
    from kd_plugin.lineage.show import verdict_lines
    from kd_plugin.lineage.start import student_source

    teachers, rows = _sources(recipe)
    run = RunLineage(
        method="recipe",
        student=student_source(student_of(recipe)),
        teachers=teachers,
        datasets=dataset_sources(rows),
        config=declarations(recipe),
    )
    Console(highlight=False, soft_wrap=True).print(verdict_lines(run.verdict.to_json(), run.graph))
    try:
        run.require_trainable(shown=True)
    except LicenseRefusedError as error:
        print(f"kd-plugin run: {error}", file=sys.stderr)
        return True
    return False


def _sources(recipe: Recipe) -> tuple[list[Source], Any]:
    """Return what the teachers are, those that correct by text last, and the rows."""
    if is_text(recipe):
        from kd_plugin.cli.text import TextCaptureConfig, make_writers

        asked = TextCaptureConfig(**{"dataset": "", **data_of(recipe), "teachers": writers_of(recipe)})
        return [writer.source for writer in make_writers(asked)], rows_of(asked) if recipe.data else None
    given = recipe.teachers or {}
    text = {n: one for n, one in given.items() if isinstance(one, Mapping) and one.get("signal") == "text"}
    scoring = [name for name in given if name not in text]
    configs = [CaptureConfig(**{"dataset": "", **data_of(recipe), **teacher_of(recipe, name)}) for name in scoring]
    found = [make_teacher(config).source for config in configs]
    if text:
        from kd_plugin.panel.block import panel_from_block

        block = {**((recipe.panel or {}).get("panel") or {}), "teachers": text}
        found += [teacher.source for teacher in panel_from_block(block).text_teachers.values()]
    return found, rows_of(CaptureConfig(**{"dataset": "", **data_of(recipe)})) if recipe.data else None
