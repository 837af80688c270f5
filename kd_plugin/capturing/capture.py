"""Capture: store what a teacher says about a dataset, once, and settings that Python, the command and YAML share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kd_plugin.cache.manifest import Manifest, Part, Settings, keep_tokens, read_manifest
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.store import Store, require_same
from kd_plugin.cache.targets import Generation, Targets, TopK
from kd_plugin.cache.templates import (
    fingerprint,
    is_conversation,
    marks_assistant,
    pinned,
    pinned_time,
    prints_time,
    with_template,
)
from kd_plugin.capturing.engines import as_asked, open_engine, require_targets, require_teacher
from kd_plugin.capturing.rows import open_rows, passed_columns
from kd_plugin.capturing.tokenization import StudentTokenization, Tokenization
from kd_plugin.capturing.work import CaptureJob, do_units
from kd_plugin.errors import ConfigError, DataError, VocabularyError
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.lineage.sources import Source
from kd_plugin.models import as_tokenizer
from kd_plugin.settings import built, option, settings, takes
from kd_plugin.teachers.base import reach, tokenizer_of
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.verifying import make_verifier, reference
from kd_plugin.views.render import Reader
from kd_plugin.views.view import OWN, View
from kd_plugin.vocab import Vocabulary

_OTHER_TOKENIZER = (
    "Targets are stored over the student's tokens, and a model with other tokens says only what bytes come next: over "
    "a longer token of the student's it has no distribution that could be stored. Let such a teacher write the "
    "completions, on whose text any student trains (docs/text-teachers.md), or score the student's own text on a panel."
)


@settings
class ScoringSettings(LineageSettings):
    """Which tokens of which rows are scored, and in which portions."""

    filter: str | None = option(
        default=None,
        help="Which completions are kept: exact_match or math_verify against answer_column, or a function as "
        "package.module:function, called with the completion and the row, which returns True, False, or the reason to "
        "drop it as text.",
    )
    answer_column: str = option(default="answer", help="Column of the reference answer.")
    temperature: float = option(default=1.0, help="The logits are divided by it before the softmax.")
    max_length: int | None = option(
        default=None, help="Tokens kept from the start of a row, as in SFTConfig; null keeps all."
    )
    completion_only: bool | None = option(
        default=None, help="Score completions only; null does so where rows have a prompt and a completion."
    )
    assistant_only: bool = option(
        default=False,
        help="Score the assistant's turns only, as assistant_only_loss trains on them; the chat template must mark "
        "them with {% generation %}.",
    )
    date: str | None = option(
        default=None,
        help="Day that a template which prints today's date is given, such as 2026-11-29; null takes that of the "
        "capture which is there, else today. It is kept in the manifest, and training renders with it.",
    )
    shard_rows: int = option(
        default=1024,
        help="Dataset rows a unit, the most that an interruption costs, and whose targets are held at once.",
    )
    batch_tokens: int = option(
        default=16_384,
        help="Tokens of a forward pass, padding included. Lower it when memory runs out; stored values then differ in "
        "rounding.",
    )
    seed: int = option(default=0, help="Seed of the draws of sampled targets.")


@dataclass(frozen=True)
class PreparedCapture:
    """A capture whose terms, rows and settings have been checked, before the teacher is loaded.

    Attributes:
        teacher: as it is asked; a server has been reached.
        job: the rows, and what turns them into examples.
        settings: of the cache, without the weights' digest and dtype.
        gate: what checks the terms of the teacher and of the rows.
        vocabulary: what the stored token ids mean.
        writer: the student that generates; None where the teacher does, or nobody.
    """

    teacher: Any
    job: CaptureJob
    settings: Settings
    gate: CaptureGate
    vocabulary: Vocabulary
    writer: LocalTeacher | None = None

    @property
    def lineage(self) -> Mapping[str, Any]:
        """Nodes and edges of who teaches and what is shown; of a server, with its own word once it is asked."""
        return self.gate.record


class CaptureGate:
    """The license gate of a capture: passed before anything is loaded, and again by the names that a server gives.

    Args:
        teachers: who teaches.
        dataset: the rows.
        lineage: the user's declarations.

    Raises:
        LicenseRefusedError: the terms of the teacher or of the rows forbid training on its outputs.
    """

    def __init__(
        self, teachers: Sequence[Source], dataset: Any, lineage: Mapping[str, Any] | str | Path | None
    ) -> None:
        from kd_plugin.lineage.data import dataset_sources

        self._teachers, self._lineage = {teacher.name: teacher for teacher in teachers}, lineage
        self._rows = dataset_sources(dataset)
        self._lock = threading.Lock()
        self.admit(teachers[0].name, ())

    def admit(self, teacher: str, served: Sequence[str]) -> None:
        """Check the teacher of this name by the names that its server gives as well; raises LicenseRefusedError."""
        from kd_plugin.lineage import outputs_record

        with self._lock:
            named = replace(self._teachers[teacher], served=tuple(dict.fromkeys(served)))
            teachers = {**self._teachers, teacher: named}
            self.record: Mapping[str, Any] = outputs_record(list(teachers.values()), self._rows, config=self._lineage)
            self._teachers = teachers


@settings
class CaptureSettings(ScoringSettings):
    """How a dataset is scored, and what is kept."""

    targets: Targets = option(default=TopK(64), help="What is kept of the distribution.")
    generate: Generation | None = option(
        default=None, help="Let the teacher generate the completions, so; None scores those that the rows hold."
    )
    by: Any = option(
        default=None,
        help="Who generates the completions in the place of the teacher, which scores them: a student, by its "
        "directory or hub id, or a LocalTeacher of it. It reads and writes by its own tokenizer.",
    )
    chat_template: str | Callable[[Any], str | None] | None = option(
        default=None,
        help="Renders conversations in the place of the tokenizer's own template; its text, or a function from the "
        "tokenizer to it, which is asked where `assistant_only` needs marks and the tokenizer's own template has none. "
        "`trl.get_training_chat_template` gives the template that TRL trains with then.",
    )
    student_tokenizer: Any = option(
        default=None,
        help="Tokenizer of the students that will be taught, a directory or hub id: rows are rendered and tokenized by "
        "it, and one cache teaches every student that has it. Left out, by the teacher's.",
    )
    view: Any = option(
        default=None,
        help="How the teacher reads a row, where not as the student does: a mapping with `context` (a Jinja template "
        "over the row's columns), `system` or `chat_template`, as a panel's `view`.",
    )

    def __post_init__(self) -> None:
        for name in ("temperature", "shard_rows", "batch_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number above 0.")


@takes(CaptureSettings)
def capture(  # noqa: D417
    dataset: Any,
    teacher: Any,
    output_dir: str | Path,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    append: bool = False,
    **fields: Any,
) -> TeacherCache:
    """Score ``dataset`` with ``teacher`` and store its outputs in ``output_dir``.

    Run the same call again to go on after an interruption: finished units are kept. Run it in several processes
    or on several machines over one directory to share the work; each returns when all of it is done.

    Args:
        dataset: a ``datasets.Dataset``, an ``IterableDataset`` (read twice, never held) or a list of rows, in any
            form that ``SFTTrainer`` takes: ``text``, ``messages``, ``prompt`` and ``completion`` (strings or
            messages), or ``input_ids`` with ``completion_mask`` or ``labels``. For ``generate`` a ``prompt`` alone.
        teacher: the teacher; its weights are loaded, or its server asked, after its terms and all settings have
            been checked.
        output_dir: the cache; a new or empty directory, or one that holds the same capture.
        tokenizer: the tokenizer of the dataset; None takes the teacher's. It must have the same tokens.
        progress: show how far it is, on standard error.
        append: add ``dataset`` to the finished cache of other data that is in ``output_dir``.

    Raises:
        LicenseRefusedError: the terms of the teacher or of the rows forbid training on its outputs; nothing was loaded.
        ConfigError: a setting is wrong, or the directory holds a capture with other settings.
        VocabularyError: the tokenizer's tokens are not the teacher's.
        DataError: a row has no form that can be scored, or nothing is left to store.
        ServerError: the server is away for good, or not what was configured; finished units are kept.
        CacheError: the directory cannot be written, or is damaged.
        NonFiniteError: the teacher's logits are not finite.
    """
    asked = built(CaptureSettings, fields)
    prepared = prepare(dataset, teacher, asked, tokenizer)
    job, held = prepared.job, prepared.settings
    part = Part(job.rows.fingerprint(), len(job.rows), first_unit=0)
    directory = Path(output_dir)
    # Who joins a capture renders with its time, unless that printed one which the manifest does not know
    ignored = ("rendered_at",) if asked.date is None and held.rendered_at is not None else ()
    # What can be compared without the weights is compared before they are loaded.
    if (directory / "manifest.json").exists():
        unknown = read_manifest(directory).settings.rendered_at is None
        require_same(
            directory, held, part, ("weights", "dtype", "written_by", *(() if unknown else ignored)), append=append
        )
    engine = open_engine(prepared.teacher, held, asked.batch_tokens, prepared.writer)
    held = replace(held, weights=engine.weights, dtype=engine.dtype, written_by=engine.written_by)
    store = Store.create_or_join(directory, held, [part], prepared.lineage, engine.describe(), append, ignored)
    engine.require_same(store.manifest.engine)
    keep_tokens(directory, prepared.vocabulary)
    do_units(store, job.rendered_at(store.manifest.settings.rendered_at), engine, progress)
    _require_rows(store.finish(), len(job.rows))
    return TeacherCache(output_dir)


def prepare(dataset: Any, teacher: Any, asked: CaptureSettings, tokenizer: Any = None) -> PreparedCapture:
    """Check what can be checked before the teacher's weights are loaded, and reach a server; see :func:`capture`."""
    require_teacher(teacher)
    writer = _writer(asked)
    written = [] if writer is None else [replace(writer.source, signal="text")]
    gate = CaptureGate([teacher.source, *written], dataset, asked.lineage)
    if hasattr(teacher, "gate"):
        teacher.gate(partial(gate.admit, teacher.source.name))
    require_targets(teacher, asked.targets, asked.temperature)
    if asked.generate is not None and writer is None and teacher.capabilities.generates is None:
        raise ConfigError(
            f"Teacher {teacher.source.name!r} is {teacher.capabilities.kind} that generates nothing, so it writes no "
            "completions. Leave generate out and give rows that hold them, or use a model in this process or a server."
        )
    kept = make_verifier(asked.filter, asked.answer_column)
    vocabulary, shared = teacher.vocabulary, None
    view = asked.view if asked.view is None or isinstance(asked.view, View) else View.from_block(asked.view, "view")
    if view is not None and view.tokenizer == OWN:
        raise ConfigError(f"The view of a capture says tokenizer: own. {_OTHER_TOKENIZER}")
    read_by = asked.student_tokenizer
    if read_by is None and writer is not None and tokenizer is None:
        read_by = writer.tokenizer
    if read_by is not None:
        if tokenizer is not None:
            raise ConfigError("tokenizer and student_tokenizer are both given; the student's reads the rows.")
        tokenizer = as_tokenizer(read_by)
        student = Vocabulary.from_tokenizer(tokenizer)
        try:
            shared = student.shared_with(vocabulary)
        except VocabularyError as error:
            raise VocabularyError(f"{error} {_OTHER_TOKENIZER}") from error
        vocabulary = student.within(vocabulary.size) if shared is None else student
    elif tokenizer is None:
        tokenizer = getattr(teacher, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(
                f"Teacher {teacher.source.name!r} has no tokenizer to read the rows with. Pass tokenizer=...: the one "
                "of the dataset, with the teacher's tokens."
            )
    else:
        Vocabulary.from_tokenizer(tokenizer).require_same_tokens(vocabulary, "dataset's tokenizer", "teacher")
    teacher = as_asked(teacher, asked.targets)
    reach(teacher)
    more: Sequence[str] | None = () if kept is None else kept.columns
    if view is not None and more is not None:
        more = (*more, *view.columns)
    rows = open_rows(dataset, asked.shard_rows, more)
    passed = passed_columns(rows.columns)
    (first,) = rows.slice(0, 1)
    if asked.assistant_only and asked.generate is not None:
        raise ConfigError("assistant_only=True scores turns that are there; with generate the teacher makes them.")
    template = _template(tokenizer, asked.chat_template, asked.assistant_only)
    rendering = tokenizer if template is None else with_template(tokenizer, template)
    now = pinned_time(asked.date)
    rendered_at = now if is_conversation(first) and prints_time(rendering) else None
    tokenization = Tokenization(
        rendering, vocabulary.size, asked.max_length, asked.completion_only, asked.assistant_only
    )
    if read_by is not None or view is not None:
        reader = None
        if view is not None:
            reader = Reader(teacher.source.name, view, rendering, tokenizer_of(teacher), pad_token_id=0)
            if is_conversation(first) and pinned(reader.template or "", now) != (reader.template or ""):
                rendered_at = now
        tokenization = StudentTokenization(tokenization, reader, shared)
    if asked.generate is None:
        tokenization(first, "row 0")
    else:
        tokenization.asked_of(tokenization.prompt(first, "row 0"), first, "row 0")
        passed = tuple(dict.fromkeys(("text", *passed)))
    if kept is not None and kept.columns is not None:
        for column in kept.columns:
            reference(first, column)
    settings = Settings(
        teacher=_portable(teacher.source.ref),
        revision=teacher.source.revision,
        weights=None,
        dtype=None,
        tokenizer=vocabulary.fingerprint,
        chat_template=Vocabulary.from_tokenizer(tokenizer).template_fingerprint,
        vocab_size=vocabulary.size,
        targets=asked.targets,
        temperature=float(asked.temperature),
        seed=asked.seed,
        max_length=asked.max_length,
        completion_only=asked.completion_only,
        shard_rows=asked.shard_rows,
        passed=passed,
        generation=asked.generate,
        filter=None if kept is None else kept.name,
        assistant_only=asked.assistant_only,
        rendered_with=fingerprint(template),
        rendered_at=rendered_at,
        for_student=read_by is not None,
        view=None if view is None else view.identity,
    )
    job = CaptureJob(rows, tokenization, kept).rendered_at(rendered_at)
    return PreparedCapture(teacher, job, settings, gate, vocabulary, writer)


def _writer(asked: CaptureSettings) -> LocalTeacher | None:
    """Return the student that generates, with nothing loaded.

    Raises:
        ConfigError: nothing is said of how.
    """
    if asked.by is None:
        return None
    if asked.generate is None:
        raise ConfigError("by names who generates, and generate is not set. Give generate=Generation(...).")
    return asked.by if hasattr(asked.by, "capabilities") else LocalTeacher(str(asked.by), name="student")


def _template(tokenizer: Any, given: str | Callable[[Any], str | None] | None, assistant_only: bool) -> str | None:
    """Return the chat template that takes the place of the tokenizer's own, or None.

    Raises:
        ConfigError: ``assistant_only`` needs marks, and the template has none.
    """
    marked = marks_assistant(tokenizer.chat_template)
    if callable(given):
        try:
            given = given(tokenizer) if assistant_only and not marked else None
        except ValueError as error:
            raise ConfigError(f"chat_template: there is none to be had for this tokenizer. {error}") from error
    template = None if given == tokenizer.chat_template else given
    if assistant_only and not (marked if template is None else marks_assistant(template)):
        raise ConfigError(
            "assistant_only=True needs a chat template that marks the assistant's turns with {% generation %}, and "
            f"{'the tokenizer has' if template is None else 'chat_template is'} none. For the template that TRL trains "
            "with give chat_template=trl.get_training_chat_template; `kd-plugin capture` does so by itself."
        )
    return template


def _require_rows(manifest: Manifest, source_rows: int) -> None:
    if manifest.rows:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
    if manifest.settings.generation is None and manifest.settings.filter is None:
        raise DataError(f"None of the {source_rows} rows has a token to score: all were cut or masked away.")
    raise DataError(
        f"Nothing is left of {source_rows} rows: every completion was dropped ({reasons}). The empty capture is "
        "finished; look at some rows, then choose another filter, more max_new_tokens or another output directory."
    )


def _portable(ref: str | None) -> str | None:
    """Name a local directory without the path to it, which differs between machines; its weights have a digest."""
    return Path(ref).resolve().name if ref is not None and Path(ref).is_dir() else ref
