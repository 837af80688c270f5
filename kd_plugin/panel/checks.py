"""What must hold of a panel and its rows before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.divergence.projection import require_temperature
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError, DataError, ServerError, VocabularyError, nearest
from kd_plugin.limits import refuse_images
from kd_plugin.panel.estimators import require_defined
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.viewing import check_view_columns, reads_own_tokens, require_readable
from kd_plugin.panel.warmup import require_fitting
from kd_plugin.sharding import most_of_any_rank
from kd_plugin.teachers.agreement import require_alike
from kd_plugin.teachers.base import Teacher, adopt_vocabulary, end_tokens, reach
from kd_plugin.views.view import STUDENT
from kd_plugin.vocab import TEMPLATE, SharedTokens, Vocabulary

logger = logging.getLogger(__name__)
_OWN_TEMPLATE = (
    " Conversations are rendered by the student's template for both: the teacher reads turn markers that it was not "
    "trained on. To let it read its own, set `view: {{chat_template: own}}` for {name!r}."
)


def require_one_vocabulary(panel: TeacherPanel, vocabulary: Vocabulary) -> Vocabulary:
    """Refuse teachers whose token ids mean other tokens than the student's, or that never end where it ends.

    Those that share a part of the student's tokens are compared over that part, which is said; those that read tokens
    of their own by their views are compared by text. Another chat template, and an end token of its own beside the
    student's, are warned of: lengths may change.

    Args:
        panel: the teachers; their tokenizers are read, not their weights.
        vocabulary: the student's. A loaded model that names no tokenizer is taken to speak it.

    Returns:
        The tokens that all heads have a row for: the student's vocabulary, cut where a head is shorter.

    Raises:
        VocabularyError: names the teacher and the first ids that differ, or the end tokens.
        ConfigError: a teacher cannot read tokens of its own.
    """
    for name, teacher in panel.teachers.items():
        adopt_vocabulary(teacher, vocabulary)
        if reads_own_tokens(panel, name, vocabulary):
            require_readable(panel, name)
            continue
        if (panel.own[name].estimator or panel.estimator).name == "byte_marginals":
            raise ConfigError(
                f"Teacher {name!r} reads the student's tokens, and estimator='byte_marginals' compares those of two "
                "tokenizers. Use estimator='exact' for this teacher, or set tokenizer: own in its view."
            )
        shared = vocabulary.shared_with(teacher.vocabulary, "student", f"teacher {name!r}")
        if shared is not None:
            _say_shared(name, shared, vocabulary, teacher.vocabulary)
        _require_common_end(panel, name, teacher, vocabulary)
        view = panel.own[name].view
        for difference in vocabulary.differences_that_change_lengths(teacher.vocabulary):
            if difference == TEMPLATE and view is not None and view.chat_template != STUDENT:
                continue
            logger.warning(
                f"The student and teacher {name!r} differ in their {difference}: the teacher may never reward "
                "the student for stopping, and lengths can explode."
                + (_OWN_TEMPLATE.format(name=name) if difference == TEMPLATE else "")
            )
    common = vocabulary
    for teacher in panel.teachers.values():
        if vocabulary.fingerprint == teacher.vocabulary.fingerprint:
            common = common.within(teacher.vocabulary.size)
    if common.is_cut:
        logger.warning(
            f"An output head of this run has {common.size} rows, fewer than the tokenizer has tokens. The tokens "
            "beyond have no probability: they are not generated, and a row that holds one is refused."
        )
    return common


def _say_shared(name: str, shared: SharedTokens, student: Vocabulary, teacher: Vocabulary) -> None:
    moved = student.moved(teacher)
    listed = ", ".join(map(repr, moved[:3])) + (" and others" if len(moved) > 3 else "")
    logger.warning(
        f"The student and teacher {name!r} share {shared.count} token ids; the student has "
        f"{shared.student_size - shared.count} more and the teacher {shared.teacher_size - shared.count}. They are "
        "compared over the shared tokens, with all others as one outcome, whose mass is logged as rest_mass. The "
        "teacher scores a response up to its first token that is not shared."
        + (f" Under another id, and so not shared: {listed}." if moved else "")
    )


def _require_common_end(panel: TeacherPanel, name: str, teacher: Teacher, vocabulary: Vocabulary) -> None:
    """Refuse a teacher that gives the student's end-of-sequence token no meaning: its student would never stop."""
    end = vocabulary.special_ids.get("eos_token")
    theirs = teacher.vocabulary.special_ids.get("eos_token")
    if end is None or theirs is None or panel.allow_other_eos:
        return
    ends = end_tokens(teacher)
    if end in ends:
        return
    raise VocabularyError(
        f"The student ends its responses with token id {end}, and teacher {name!r} with {sorted(ends)}: the "
        "teacher gives the student's end token next to no probability, so the student would unlearn to stop and "
        "lengths would grow without bound. Take a teacher of the same chat format, set one eos_token on both "
        "tokenizers, or, if the teacher does end that way, set allow_other_eos=True."
    )


def require_fitting_student(
    panel: TeacherPanel,
    vocabulary: Vocabulary,
    reference: str | None,
    config: Callable[[], Any],
    caches: Sequence[TeacherCache],
    *,
    allow_misaligned: bool,
) -> Vocabulary:
    """Compare a student with its teachers and caches, and reach the teachers that compute elsewhere.

    Call it after the license gate, before the student is loaded.

    Args:
        panel: the teachers.
        vocabulary: of the student.
        reference: see :func:`require_adapters_fit`, like ``config``.
        config: see there.
        caches: of the warm-up, see :func:`~kd_plugin.panel.warmup.require_fitting`.
        allow_misaligned: see there.

    Returns:
        The tokens that all heads have a row for.
    """
    vocabulary = require_one_vocabulary(panel, vocabulary)
    require_adapters_fit(panel, reference, config)
    require_fitting(caches, vocabulary, allow_misaligned=allow_misaligned)
    require_reachable(panel)
    return vocabulary


def check_rows(dataset: Any, name: str, panel: TeacherPanel) -> None:
    """Refuse a dataset without prompts or with rows that no teacher can score, before anything is loaded.

    Args:
        dataset: rows with ``prompt``, and ``teacher_id`` or ``domain`` where the panel needs them.
        name: how messages call it.
        panel: who scores.

    Raises:
        DataError: no column ``prompt``, one of images, or a row names a teacher that is not on the panel, or none
            where it must.
    """
    from datasets import Dataset

    columns = dataset.column_names or list(next(iter(dataset)))
    refuse_images(columns, name)
    if "prompt" not in columns:
        raise DataError(
            f"{name} has no column 'prompt'; it has {', '.join(map(repr, columns))}. The student generates the "
            "completions itself, so each row needs the prompt alone, as text or as messages."
        )
    check_verified_columns(panel, list(columns), name)
    if not isinstance(dataset, Dataset):
        panel.assign(next(iter(dataset)))
        check_view_columns(panel, columns, dataset, name)
        return
    check_view_columns(panel, columns, dataset, name)
    present = [column for column in ("teacher_id", "domain", "teacher_weights") if column in columns]
    if not present:
        panel.assign({})
        return
    seen = set()
    for row in dataset.select_columns(present):
        key = repr(row)
        if key not in seen:
            seen.add(key)
            panel.assign(row)


def require_reachable(panel: TeacherPanel) -> None:
    """Reach the teachers that compute elsewhere, before the student is loaded.

    Args:
        panel: the teachers; call it after the license gate.

    Raises:
        ServerError: one is away, does not serve the model, or gives no log-probabilities.
        VocabularyError, ConfigError: it has another tokenizer, or lists fewer tokens than were asked for.
    """
    for name, teacher in panel.members.items():
        if name in panel.text_teachers and panel.text.recorded:
            continue  # nobody asks it
        try:
            reach(teacher)
        except ServerError as error:
            if name not in panel.text_teachers or panel.text.min_teachers is None:
                raise
            # Whether enough are left is seen with the first batch, by all ranks together
            logger.warning("Text teacher %r cannot be reached before the run begins: %s", name, error)


def require_one_server(panel: TeacherPanel, device: torch.device) -> None:
    """Refuse servers that are other ones on other ranks, as a balancer may choose by address; every rank must call it.

    Args:
        panel: the teachers, which were reached.
        device: where collectives of the default process group run.

    Raises:
        ServerError: two ranks got log-probabilities of the same tokens that rounding does not explain.
    """
    for name, teacher in panel.teachers.items():
        mine = [round(value * 1000) for value in reach(teacher)]
        most = most_of_any_rank(mine, device)
        least = [-value for value in most_of_any_rank([-value for value in mine], device)]
        apart = np.array([(a - b) / 1000 for a, b in zip(most, least, strict=True)])
        require_alike(f"The server of teacher {name!r}", "a probe, sent from each rank,", apart)


def require_adapters_fit(panel: TeacherPanel, reference: str | None, config: Callable[[], Any]) -> None:
    """Refuse adapters on the student's base that were trained on another one, before the student is loaded.

    Args:
        panel: the teachers.
        reference: path or hub id of the student, or of its base; None for a model in memory that names none. That of
            an adapter tells nothing of its base, which is compared once it is there.
        config: returns the transformers configuration of the student; called where there is such an adapter.

    Raises:
        ConfigError: the adapter is for another base.
    """
    sharing: list[Any] = [t for t in panel.teachers.values() if t.capabilities.shares == "student"]
    if not sharing or (reference is not None and Path(reference, "adapter_config.json").is_file()):
        return
    found = config()
    for teacher in sharing:
        teacher.require_student(reference, found)


def require_defined_panel(panel: TeacherPanel, divergence: Divergence, temperature: float) -> None:
    """Refuse a panel that asks for something that is not defined; nothing is loaded for it.

    Args:
        panel: the teachers, and how they are combined.
        divergence: for teachers without one of their own.
        temperature: for teachers without one of their own.

    Raises:
        ConfigError: says what is not defined, why, and what is.
    """
    require_temperature(temperature)
    for name, teacher in panel.teachers.items():
        own = panel.own[name]
        if panel.mode.one_divergence and own.divergence is not None:
            raise ConfigError(
                f"Teacher {name!r} has a divergence of its own, but combine={panel.combine!r} "
                f"{panel.mode.one_divergence}. Set divergence for the run, or use combine='weighted_kl'."
            )
        require_defined(
            name,
            teacher,
            own.estimator or panel.estimator,
            panel.combine,
            own.divergence or divergence,
            own.temperature_or(temperature),
        )


def require_correctable(panel: TeacherPanel, rollouts: str) -> None:
    """Refuse text teachers where the panel replaces tokens as they are generated.

    Args:
        panel: the teachers.
        rollouts: who generates, as in the settings.

    Raises:
        ConfigError: says why, and what can be.
    """
    if panel.text_teachers and rollouts == "interleaved":
        raise ConfigError(
            f"Teacher {next(iter(panel.text_teachers))!r} corrects by text, and rollouts='interleaved' asks every "
            "teacher of a row for distributions. Let the student generate alone (rollouts='student')."
        )


def check_verified_columns(panel: TeacherPanel, columns: Sequence[str], name: str) -> None:
    """Refuse a dataset without the columns that the panel's verifiers read.

    Raises:
        DataError: names the column and the way out.
    """
    for verifier in panel.verifiers:
        for column in verifier.columns or ():
            if column not in columns:
                raise DataError(
                    f"The verifier {verifier.name} reads the column {column!r}, and {name} has none; it has "
                    f"{', '.join(map(repr, columns))}. Name the right one with answer_column."
                    + nearest(column, list(columns))
                )


def require_no_shared_tensors(panel: TeacherPanel) -> None:
    """Refuse adapter teachers under FSDP1, where accelerate puts others in the place of the base's parameters.

    Raises:
        ConfigError: names the teacher.
    """
    for name, teacher in panel.teachers.items():
        if teacher.capabilities.shares is not None:
            raise ConfigError(
                f"Teacher {name!r} is {teacher.capabilities.kind}, which shares the tensors of its base; accelerate's "
                "FSDP replaces them by shards. Merge the adapter into a model of its own, or train under DeepSpeed."
            )
