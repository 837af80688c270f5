"""Captures for a student's tokenizer: its template and its positions, while the teacher reads under a view of its own.

A row is rendered and tokenized as the student's training does, so that one capture teaches every student with that
tokenizer. The teacher is asked about the same response behind the prompt that it reads: by its own template, with a
solution or a hint that the student never sees. What it says of tokens that only it has joins what is not listed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_plugin.cache.schema import Example, Extracted
from kd_plugin.cache.templates import pinned
from kd_plugin.capturing.tokenization import Tokenization
from kd_plugin.errors import DataError
from kd_plugin.rollouts.rows import Span
from kd_plugin.views.render import Reader, Reading
from kd_plugin.vocab import SharedTokens

CANNOT_READ = "a token that the teacher has not"


class StudentTokenization(Tokenization):
    """Turns rows into a student's examples, each with what the teacher is asked in its place.

    Args:
        tokenization: by the student's tokenizer.
        reader: reads for the teacher under its view; None where it reads what the student reads.
        shared: what the teacher's vocabulary shares with the student's; None for the same tokens.
    """

    def __init__(self, tokenization: Tokenization, reader: Reader | None, shared: SharedTokens | None) -> None:
        self.__dict__.update(tokenization.__dict__)
        self._reader, self._shared = reader, shared

    def __call__(self, row: Mapping[str, Any], where: str = "a row") -> Example | None:
        """Tokenize ``row`` as the student reads it, and as the teacher does; see :class:`Tokenization`.

        Raises:
            DataError: the row cannot be rendered under the view.
        """
        example = super().__call__(row, where)
        return None if example is None else self._read(example, row, where)

    def asked_of(self, prompt: NDArray[np.int32], row: Mapping[str, Any], where: str) -> NDArray[np.int32]:
        """Return the prompt that the teacher goes on from, where the student's is ``prompt``."""
        if self._reader is None:
            return prompt
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        student = Reading(ids, torch.ones_like(ids), len(prompt), [[]], [Span(0, len(prompt))])
        read = self._reading(row, student, where)
        return read.input_ids[0, read.spans[0].first : read.start].numpy().astype(np.int32)

    def written(
        self, prompt: NDArray[np.int32], ids: NDArray[np.int32], row: Mapping[str, Any], passed: Mapping[str, Any]
    ) -> Example:
        """Return the student's example of a completion that the teacher wrote."""
        return self._read(super().written(prompt, ids, row, passed), row, "a completion")

    def kept(self, found: Extracted) -> Extracted:
        """Return targets with shared tokens listed alone."""
        return found if self._shared is None else only_shared(found, self._shared)

    def why_not(self, example: Example) -> str | None:
        """Say why the teacher cannot be asked about an example."""
        if self._shared is None:
            return None
        ids = (example if example.asked is None else example.asked).input_ids.tolist()
        return CANNOT_READ if self._shared.readable(ids) < len(ids) else None

    def rendered_at(self, moment: str | None) -> StudentTokenization:
        """See :meth:`Tokenization.rendered_at`; the view's template prints that time too."""
        own = copy.copy(self)
        own._renderer = super().rendered_at(moment)._renderer
        if self._reader is not None and moment is not None:
            own._reader = self._reader.with_template(lambda template: pinned(template, moment))
        return own

    def _read(self, example: Example, row: Mapping[str, Any], where: str) -> Example:
        if self._reader is None:
            return example
        start = int(example.completion_mask.argmax())
        if not start:
            raise DataError(
                f"{where} has no prompt, and the teacher reads under a view, which shows another prompt. Give rows "
                "with 'prompt' and 'completion', or leave the view out."
            )
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        offsets = (example.scored + 1 - start).tolist()
        student = Reading(ids, torch.ones_like(ids), start, [offsets], [Span(0, len(example.input_ids))])
        read = self._reading(row, student, where)
        first = read.spans[0].first
        tokens = read.input_ids[0, first : read.spans[0].stop].numpy().astype(np.int32)
        scored = np.asarray([read.start - first + c - 1 for c in read.positions[0]], np.int64)
        mask = np.zeros(len(tokens), np.int8)
        mask[scored + 1] = 1
        asked = Example(example.example_id, tokens, mask, scored, {})
        return replace(example, asked=asked)

    def _reading(self, row: Mapping[str, Any], student: Reading, where: str) -> Reading:
        assert self._reader is not None
        if "prompt" not in row:
            raise DataError(f"{where} has no column 'prompt', which the view renders for the teacher.")
        try:
            return self._reader.read([row], student)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def only_shared(found: Extracted, shared: SharedTokens) -> Extracted:
    """Return targets with shared tokens listed alone; the mass of others joins what is not listed.

    Sampled targets have nothing for what is not listed: the draws of other tokens go.
    """
    keep = np.zeros(max(shared.teacher_size, int(found.ids.max(initial=0)) + 1), bool)
    keep[shared.ids()] = True
    kept = keep[found.ids]
    if kept.all():
        return found
    position = np.repeat(np.arange(len(found.counts)), found.counts)
    counts = np.bincount(position[kept], minlength=len(found.counts)).astype(np.int32)
    tail = found.tail_logmass
    if found.draws is None:
        mass = np.bincount(position, np.where(kept, 0.0, np.exp(found.logprobs.astype(np.float64))), len(found.counts))
        with np.errstate(divide="ignore"):
            tail = np.logaddexp(tail.astype(np.float64), np.log(mass)).astype(np.float32)
    draws = None if found.draws is None else found.draws[kept]
    return Extracted(counts, found.ids[kept], found.logprobs[kept], tail, draws, found.mean_logprob)
