"""The views of a panel's teachers: what must hold of them, and who reads rows under them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kd_plugin.errors import ConfigError, DataError, VocabularyError, nearest
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import RowScores
from kd_plugin.teachers.base import Teacher, end_tokens, most_tokens, tokenizer_of
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.views.render import Reader
from kd_plugin.views.tokens import TokenText
from kd_plugin.vocab import Vocabulary

_TRIED = 8  # rows whose context is rendered before anything is loaded


def readers_of(
    panel: TeacherPanel,
    tokenizer: Any,
    vocabulary: Vocabulary,
    *,
    pad_token_id: int,
    ends: Sequence[int],
    chat_options: Mapping[str, Any] | None = None,
) -> dict[str, Reader]:
    """Return a reader for each teacher that has a view.

    Args:
        panel: the teachers, which are loaded or were reached.
        tokenizer: the student's.
        vocabulary: the student's.
        pad_token_id: the student's.
        ends: the student's, of a response.
        chat_options: further arguments of ``apply_chat_template``.

    Raises:
        ConfigError: a view needs a tokenizer or a template that its teacher does not have.
    """
    found = {}
    for name, view in panel.views.items():
        teacher = panel.teachers[name]
        own = view.reads_own_tokens(vocabulary, teacher.vocabulary)
        if own and (panel.own[name].estimator or panel.estimator).name == "byte_marginals":
            _require_bytes(TokenText(tokenizer, "the student"))
        found[name] = Reader(
            name,
            view,
            tokenizer,
            tokenizer_of(teacher),
            pad_token_id=_pad(teacher) if own else pad_token_id,
            chat_options=chat_options,
            limit=most_tokens(teacher),
            own_tokens=own,
            end_tokens=ends,
            size=vocabulary.size,
        )
    return found


def _pad(teacher: Teacher) -> int:
    special = teacher.vocabulary.special_ids
    return special.get("pad_token", special.get("eos_token", 0))


def reads_own_tokens(panel: TeacherPanel, name: str, vocabulary: Vocabulary) -> bool:
    """Whether a teacher reads tokens of its own by its view, and not the student's ``vocabulary``."""
    view = panel.own[name].view
    return view is not None and view.reads_own_tokens(vocabulary, panel.teachers[name].vocabulary)


def require_readable(panel: TeacherPanel, name: str) -> None:
    """Refuse a teacher that is to read tokens of its own and cannot, or cannot be compared by what it is asked for.

    Args:
        panel: the teachers.
        name: of the teacher.

    Raises:
        ConfigError: it has no tokenizer, or one that gives neither text nor offsets; or its estimator needs the same
            tokens.
        VocabularyError: it has no token that ends a turn.
    """
    teacher, tokenizer = panel.teachers[name], tokenizer_of(panel.teachers[name])
    estimator = (panel.own[name].estimator or panel.estimator).name
    has = teacher.capabilities
    if estimator == "exact":
        raise ConfigError(
            f"Teacher {name!r} reads tokens of its own, and estimator='exact' compares two distributions over the same "
            "tokens. Use estimator='byte_marginals' (the next byte; a teacher in this process or with signal: hidden), "
            "'topk_tail' (its likeliest tokens, said in the student's), 'sampled' or "
            "'chunk_likelihood' (the probabilities of the text that stands there) for this teacher."
        )
    if not has.any_row:
        raise ConfigError(
            f"Teacher {name!r} is {has.kind}: it holds targets for the tokens that it was captured with, and cannot "
            "score others. Capture with the student's tokenizer, and leave tokenizer: own out of its view."
        )
    if tokenizer is None:
        raise ConfigError(
            f"Teacher {name!r} is to read tokens of its own, and has no tokenizer. Give it one, or set "
            "tokenizer: student in its view."
        )
    text = TokenText(tokenizer, f"teacher {name!r}")
    if estimator == "byte_marginals":
        _require_bytes(text)
    if not end_tokens(teacher) and not panel.allow_other_eos:
        raise VocabularyError(
            f"Teacher {name!r} has no token that ends a turn (no eos_token), so the student's has no counterpart: the "
            "student would never learn when to stop. Set the eos_token of its tokenizer, or set allow_other_eos=True, "
            "which leaves the ends of responses unscored by it."
        )


def _require_bytes(text: TokenText) -> None:
    if text.kind == "offsets":
        raise ConfigError(
            f"The tokenizer of {text.name} does not say which bytes its tokens stand for (it normalises, or marks "
            "words otherwise than byte-level and SentencePiece tokenizers do), so estimator='byte_marginals' cannot "
            "sum over them. Use estimator='topk_tail' or 'sampled', which align by offsets."
        )


def require_viewable(panel: TeacherPanel, rollouts: str) -> None:
    """Refuse views where nothing could read under them.

    Args:
        panel: the teachers, of which nothing is loaded.
        rollouts: who generates, as in the settings.

    Raises:
        ConfigError: says why, and what can be.
    """
    for name in panel.views:
        has = panel.teachers[name].capabilities
        if not has.any_row:
            raise ConfigError(
                f"Teacher {name!r} is {has.kind} and has a view, but how it read was decided when it was captured: its "
                "targets stand at the student's own tokens. Give the view to `kd-plugin capture`, leave it out here."
            )
        if rollouts == "interleaved":
            raise ConfigError(
                f"Teacher {name!r} has a view, and rollouts='interleaved': there the panel replaces tokens by what it "
                "finds likely after the student's own prompt, which is not what the view shows. Let the student "
                "generate alone (rollouts='student'), or leave the view out."
            )


def coverage(scores: Sequence[RowScores], names: Sequence[str]) -> dict[str, float]:
    """Return the share of scored tokens that each of some teachers compares in its own tokens, for the log."""
    found: dict[str, float] = {}
    for name in names:
        signals = [one for row in scores if isinstance(one := row.signals.get(name), ChunkSignal)]
        tokens = sum(map(len, signals))
        found |= {f"coverage/{name}": sum(int(one.compared.sum()) for one in signals) / tokens} if tokens else {}
    return found


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
