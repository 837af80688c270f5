"""How one teacher reads a response: its system message, further context, chat template and tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kd_plugin.errors import ConfigError, DataError, VocabularyError, nearest, require_known_keys
from kd_plugin.settings import require_known
from kd_plugin.vocab import Vocabulary

Tokens = Literal["auto", "student", "own"]
STUDENT, OWN = "student", "own"
_MOST = 0.95  # of the student's tokens, that a teacher must share to read them


@dataclass(frozen=True)
class View:
    r"""How a teacher reads what the student generated.

    Attributes:
        system: the system message that the teacher reads, in the place of the prompt's; None leaves that.
        context: a Jinja template over the row's columns, such as ``"Reference solution:\n{{ solution }}"``. What it
            gives is added to the last message of the user (before a prompt that is text). The student does not see it.
        chat_template: ``student`` renders by the student's template, ``own`` by that of the teacher's tokenizer,
            anything else is a file that holds a template.
        tokenizer: whose tokens the teacher reads. ``auto`` takes the student's where the teacher has the same ones, or
            shares most of them, and the teacher's own elsewhere; ``own`` always takes the teacher's own.
        min_coverage: share of scored tokens that must be comparable with the teacher's own. Of a response below it the
            teacher scores nothing but what it cannot have written; a run whose last responses are together below it
            is refused.

    Raises:
        ConfigError: an unknown name, a template that is no template or has no file, a share out of range.
    """

    system: str | None = None
    context: str | None = None
    chat_template: str = STUDENT
    tokenizer: Tokens = "auto"
    min_coverage: float = 0.8

    def __post_init__(self) -> None:
        require_known("tokenizer of a view", self.tokenizer, get_args(Tokens))
        if not 0.0 <= self.min_coverage <= 1.0:
            raise ConfigError(f"min_coverage is {self.min_coverage}; expected a share between 0 and 1.")
        if self.chat_template not in (STUDENT, OWN) and not Path(self.chat_template).is_file():
            raise ConfigError(
                f"chat_template is {self.chat_template!r}, and there is no such file; expected 'student', 'own' or a "
                "file with a Jinja template." + nearest(self.chat_template, [STUDENT, OWN])
            )
        _ = self.columns  # a wrong template shows now

    @classmethod
    def from_block(cls, block: Any, where: str) -> View:
        """Make a view of a mapping, as it stands in YAML.

        Raises:
            ConfigError: an unknown key, or what the view refuses.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {type(block).__name__}.")
        require_known_keys(block, [field.name for field in fields(cls)], where)
        try:
            return cls(**block)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a row that the context may read, in alphabetical order."""
        if self.context is None:
            return ()
        return tuple(sorted(meta.find_undeclared_variables(_parsed(self.context))))

    @property
    def file_text(self) -> str | None:
        """The text of the file that ``chat_template`` names; None where it names none."""
        if self.chat_template in (STUDENT, OWN):
            return None
        return Path(self.chat_template).read_text(encoding="utf-8")

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this view from others, JSON-ready: texts by their sha256, the names of columns, and choices."""
        texts = {"system": self.system, "context": self.context, "template_file": self.file_text}
        found: dict[str, Any] = {name: digest(text) for name, text in texts.items() if text is not None}
        return {"chat_template": self.chat_template, **found, "tokenizer": self.tokenizer, "columns": [*self.columns]}

    def reads_own_tokens(self, student: Vocabulary, teacher: Vocabulary) -> bool:
        """Whether the teacher reads tokens of its own, which are then aligned with the student's by their text."""
        if self.tokenizer != "auto":
            return self.tokenizer == OWN
        try:
            shared = student.shared_with(teacher, "student", "teacher")
        except VocabularyError:
            return True
        # A teacher scores a response up to its first token that is not shared
        return shared is not None and shared.count < _MOST * student.size

    def context_of(self, row: Mapping[str, Any]) -> str:
        """Return what the context's template makes of a row; empty where there is none.

        Raises:
            DataError: the row lacks a column, holds None where the template prints it, or the template fails.
        """
        if self.context is None:
            return ""
        try:
            return self._template.render(**row)
        except UndefinedError as error:
            raise DataError(
                f"The context of a view cannot be rendered: {error}. It reads the columns "
                f"{', '.join(map(repr, self.columns))}, and the row has {', '.join(map(repr, row))}."
            ) from error
        except DataError:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise DataError(
                f"The context of a view cannot be rendered: {type(error).__name__}: {error}. Repair its template or "
                "the row."
            ) from error

    @cached_property
    def _template(self) -> Template:
        assert self.context is not None
        return _ENVIRONMENT.from_string(self.context)


def digest(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _printed(value: Any) -> Any:
    if value is None:
        raise DataError(
            "The context of a view prints a column that is None in this row. Fill the column, or test it in the "
            "template: {% if hint %}...{% endif %}."
        )
    return value


# A template comes with a configuration, which somebody else may have written: it can neither call nor change anything
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printed)


def _parsed(text: str) -> Any:
    try:
        return _ENVIRONMENT.parse(text)
    except TemplateSyntaxError as error:
        where = f"line {error.lineno}"
        raise ConfigError(f"The context of a view is no Jinja template: {where}: {error.message}.") from None
