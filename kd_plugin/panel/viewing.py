"""The views of a panel's teachers: what must hold of them, and who reads rows under them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from kd_plugin.errors import ConfigError, DataError, nearest
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.teachers.base import most_tokens, tokenizer_of
from kd_plugin.views.render import Reader

_TRIED = 8  # rows whose context is rendered before anything is loaded


def readers_of(
    panel: TeacherPanel, tokenizer: Any, *, pad_token_id: int, chat_options: Mapping[str, Any] | None = None
) -> dict[str, Reader]:
    """Return a reader for each teacher that has a view.

    Args:
        panel: the teachers, which are loaded or were reached.
        tokenizer: the student's.
        pad_token_id: the student's.
        chat_options: further arguments of ``apply_chat_template``.

    Raises:
        ConfigError: a view needs a tokenizer or a template that its teacher does not have.
    """
    return {
        name: Reader(
            name,
            view,
            tokenizer,
            tokenizer_of(panel.teachers[name]),
            pad_token_id=pad_token_id,
            chat_options=chat_options,
            limit=most_tokens(panel.teachers[name]),
        )
        for name, view in panel.views.items()
    }


def require_viewable(panel: TeacherPanel, rollouts: str) -> None:
    """Refuse views where nothing could read under them.

    Args:
        panel: the teachers, of which nothing is loaded.
        rollouts: who generates, as in the settings.

    Raises:
        ConfigError: says why, and what can be.
    """
    for name in panel.views:
        if rollouts == "interleaved":
            raise ConfigError(
                f"Teacher {name!r} has a view, and rollouts='interleaved': there the panel replaces tokens by what it "
                "finds likely after the student's own prompt, which is not what the view shows. Let the student "
                "generate alone (rollouts='student'), or leave the view out."
            )


def check_view_columns(
    panel: TeacherPanel, columns: Iterable[str], rows: Iterable[Mapping[str, Any]], name: str
) -> None:
    """Refuse a dataset without the columns that views read, or whose first rows they cannot render.

    Args:
        panel: the teachers.
        columns: of the dataset.
        rows: the dataset; its first rows are read.
        name: how messages call it.

    Raises:
        DataError: names the teacher, the column and the way out.
    """
    present = list(columns)
    for teacher, view in panel.views.items():
        for column in view.columns:
            if column not in present:
                raise DataError(
                    f"The context of teacher {teacher!r} reads the column {column!r}, and {name} has none; it has "
                    f"{', '.join(map(repr, present))}." + nearest(column, present)
                )
        if view.columns:
            for row in itertools.islice(rows, _TRIED):
                if _is_asked(panel, teacher, row):
                    view.context_of(row)


def _is_asked(panel: TeacherPanel, teacher: str, row: Mapping[str, Any]) -> bool:
    return teacher in panel.assign(row).teachers
