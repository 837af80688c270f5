"""What passes between a response and the teachers that evaluate and correct it in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

from kd_plugin.lineage.sources import Source
from kd_plugin.text.writers import Usage


@dataclass(frozen=True)
class Case:
    """A response that is evaluated and corrected.

    Attributes:
        prompt: text or messages.
        response: the student's, or a correction that others vote on.
        row: the dataset's row, for verifiers.
        teachers: names of the text teachers that are asked.
        tokens: of the response, as the student drew them.
    """

    prompt: Any
    response: str
    row: Mapping[str, Any] = field(default_factory=dict)
    teachers: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What a teacher thinks of a response.

    Attributes:
        score: in [0, 1]; None where its reply could not be parsed.
        first_wrong: number of the first step that is wrong, from 1; None where it names none.
        reply: its own words.
        problem: why the reply could not be parsed; empty where it could.
        usage: tokens read and written; None where nobody counts.
    """

    score: float | None
    first_wrong: int | None = None
    reply: str = ""
    problem: str = ""
    usage: Usage | None = None


@dataclass(frozen=True)
class Correction:
    """What a teacher would have had the student say.

    Attributes:
        text: the whole corrected response; None where its reply could not be parsed.
        reply: its own words.
        problem: why the reply could not be parsed; empty where it could.
        usage: tokens read and written; None where nobody counts.
    """

    text: str | None
    reply: str = ""
    problem: str = ""
    usage: Usage | None = None


@runtime_checkable
class TextTeacher(Protocol):
    """A teacher that evaluates and corrects by text. How it is reached never matters.

    A class may also have ``gate``, ``reach`` and ``identity``, as :class:`~kd_plugin.teachers.base.Teacher`, and
    ``adopt_templates``, which is told what it shall ask by.
    """

    @property
    def source(self) -> Source:
        """What this teacher is and under which terms; its ``signal`` is ``text``."""
        ...

    def evaluate(self, cases: Sequence[Case]) -> list[Evaluation]:
        """Evaluate each response.

        Raises:
            ServerError: the teacher cannot be reached.
        """
        ...

    def correct(self, cases: Sequence[Case], first_wrong: Sequence[int | None]) -> list[Correction]:
        """Correct each response.

        Args:
            cases: the responses.
            first_wrong: for each the number of the first step that is wrong, from where the teacher goes on; None to
                rewrite the response.

        Raises:
            ServerError: the teacher cannot be reached.
        """
        ...


def is_text_teacher(found: Any) -> TypeGuard[TextTeacher]:
    """Whether an object teaches by text."""
    return hasattr(found, "evaluate") and hasattr(found, "correct") and hasattr(found, "source")
