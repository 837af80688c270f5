"""What must hold of a panel and its rows before anything is loaded."""

from __future__ import annotations

import logging
from typing import Any

from kd_plugin.errors import DataError
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)


def require_one_vocabulary(panel: TeacherPanel, vocabulary: Vocabulary) -> None:
    """Refuse teachers whose token ids mean other tokens than the student's; warn of what changes lengths.

    Args:
        panel: the teachers; their tokenizers are read, not their weights.
        vocabulary: the student's. A loaded model that names no tokenizer is taken to speak it.

    Raises:
        VocabularyError: names the teacher and the first ids that differ.
    """
    for name, teacher in panel.teachers.items():
        if isinstance(teacher, LocalTeacher) and not teacher.names_a_tokenizer:
            logger.warning(
                f"Teacher {name!r} is a loaded model that names no tokenizer; its token ids are taken to be the "
                "student's. Pass LocalTeacher(model, tokenizer=...) to have them checked."
            )
            teacher.assume_vocabulary(vocabulary)
        vocabulary.require_same_tokens(teacher.vocabulary, "student", f"teacher {name!r}")
        for difference in vocabulary.differences_that_change_lengths(teacher.vocabulary):
            logger.warning(
                f"The student and teacher {name!r} differ in their {difference}: the teacher may never reward "
                "the student for stopping, and lengths can explode."
            )


def check_rows(dataset: Any, name: str, panel: TeacherPanel) -> None:
    """Refuse a dataset without prompts or with rows that no teacher can judge, before anything is loaded.

    Args:
        dataset: rows with ``prompt``, and ``teacher_id`` or ``domain`` where the panel needs them.
        name: how messages call it.
        panel: who judges.

    Raises:
        DataError: no column ``prompt``, or a row names a teacher that is not on the panel, or none where it must.
    """
    from datasets import Dataset

    columns = dataset.column_names or list(next(iter(dataset)))
    if "prompt" not in columns:
        raise DataError(
            f"{name} has no column 'prompt'; it has {', '.join(map(repr, columns))}. The student writes the "
            "completions itself, so each row needs the prompt alone, as text or as messages."
        )
    if not isinstance(dataset, Dataset):
        first = next(iter(dataset))
        panel.judges(first.get("teacher_id"), first.get("domain"))
        return
    ids = dataset["teacher_id"] if "teacher_id" in columns else [None]
    domains = dataset["domain"] if "domain" in columns else [None]
    seen = set()
    for row in range(max(len(ids), len(domains))):
        teacher_id = ids[row] if len(ids) > row else None
        domain = domains[row] if len(domains) > row else None
        key = (tuple(teacher_id) if isinstance(teacher_id, list) else teacher_id, domain)
        if key not in seen:
            seen.add(key)
            panel.judges(teacher_id, domain)
