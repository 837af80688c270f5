"""A teacher whose scores were captured before: the targets of a cache."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lineage.sources import Source
from kd_plugin.signals import SparseSignal
from kd_plugin.teachers.base import Capabilities
from kd_plugin.vocab import Vocabulary

if TYPE_CHECKING:
    from kd_plugin.cache.reader import TeacherCache


class CachedTeacher:
    """Scores rows whose completions are fixed, from a teacher cache; a row that is not in the cache is an error.

    Args:
        cache: the directory of a cache, or an open one.
        tokenizer: the tokenizer that it was captured with, or a directory or hub id to load it from; None takes the
            teacher's that the cache names.
        name: how metrics and lineage call it.
    """

    def __init__(self, cache: str | Path | TeacherCache, *, tokenizer: Any = None, name: str = "teacher") -> None:
        from kd_plugin.cache.reader import TeacherCache

        self.name = name
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        self._tokenizer = tokenizer

    @property
    def source(self) -> Source:
        """The cache as an ancestor, which brings along who filled it."""
        return self.cache.source

    @property
    def capabilities(self) -> Capabilities:
        """What was captured, of the rows that were captured, at the temperature of the capture."""
        return Capabilities(
            "a cache",
            frozenset({"draws" if self.is_sampled else "top_k"}),
            any_row=False,
            temperature=self.temperature,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The cache, by content."""
        return {"kind": "cached", "content": self.cache.manifest.content_digest}

    @property
    def temperature(self) -> float:
        """At which the targets were captured."""
        return self.cache.manifest.settings.temperature

    @property
    def is_sampled(self) -> bool:
        """Whether the targets are draws with their counts, not a list of the likeliest tokens."""
        from kd_plugin.cache.targets import Sampled

        return isinstance(self.cache.manifest.settings.targets, Sampled)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The token ids of the targets.

        Raises:
            ConfigError: no tokenizer is known, or it is not the one of the capture.
        """
        settings = self.cache.manifest.settings
        found = self._tokenizer if self._tokenizer is not None else settings.teacher
        if found is None:
            raise ConfigError(
                f"The cache {self.cache.path} names no teacher to take a tokenizer from. Pass "
                "CachedTeacher(cache, tokenizer=...)."
            )
        if isinstance(found, str | Path):
            from transformers import AutoTokenizer

            try:
                found = AutoTokenizer.from_pretrained(found)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"No tokenizer can be loaded from {str(found)!r} for the cache {self.cache.path} ({error}). Pass "
                    "CachedTeacher(cache, tokenizer=...): the one of the capture, its directory or its hub id."
                ) from error
        vocabulary = Vocabulary.from_tokenizer(found)
        self.cache.require_compatible(vocabulary, temperature=settings.temperature)
        return vocabulary.within(settings.vocab_size)

    def adopt_vocabulary(self, student: Vocabulary) -> None:
        """Take the student's vocabulary for the cache's own, if it has the fingerprint of the capture.

        Raises:
            VocabularyError: it has another one, of which too little is shared.
        """
        self.cache.require_compatible(student, temperature=self.temperature)
        own = student if self.cache.shared_with(student) is None else self.cache.tokens_kept
        assert own is not None
        self.__dict__["vocabulary"] = own.within(self.cache.manifest.vocab_size)

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> SparseSignal:
        """Look up the targets at ``positions``; see :meth:`~kd_plugin.teachers.base.Teacher.score`.

        Raises:
            DataError: a row, or a position of it, is not in the cache.
        """
        ids, mask = input_ids.cpu(), attention_mask.cpu() != 0
        length = ids.shape[1]
        wanted = positions.cpu()
        index = torch.full_like(ids, -1)
        for row in torch.unique(wanted // length).tolist():
            found = self.cache.find_index(ids[row][mask[row]].tolist())
            if found is None:
                printed = self.cache.manifest.settings.rendered_at
                raise DataError(
                    f"Teacher {self.name!r}: a row of {int(mask[row].sum())} tokens is not in the cache "
                    f"{self.cache.path}. A cache scores the rows that it was captured from, not what the student "
                    "generates: route only rows with fixed completions to it, tokenized and truncated as in the capture"
                    + (f", whose chat template printed the time {printed}." if printed else ".")
                )
            index[row][mask[row]] = torch.tensor(found, dtype=index.dtype)
        chosen = index.reshape(-1).index_select(0, wanted)
        if bool((chosen < 0).any()):
            raise DataError(
                f"Teacher {self.name!r}: {int((chosen < 0).sum())} of {len(chosen)} positions have no target in "
                f"{self.cache.path}; it was captured with another completion mask."
            )
        adopted = self.__dict__.get("vocabulary")  # a student's head may have fewer rows; none is read for it
        cache = self.cache if adopted is None else self.cache.within(adopted.size)
        return cache.signal(chosen).to(input_ids.device)
