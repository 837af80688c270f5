"""A writer in this process: a transformers model that is asked as a server is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.capturing.generating import Completion, Request, generate_locally
from kd_plugin.errors import ConfigError
from kd_plugin.lineage.sources import Source
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.text.spending import Prices
from kd_plugin.text.writers import FINISHED, TOO_LONG, Answer, Ask, Key, Usage, split_reasoning


class LocalWriter:
    """A transformers language model in this process that writes, several texts at once.

    Nothing is loaded until the first text is asked for, so that the license gate can refuse it first. A text depends on
    its prompt and its seed, and not on those beside it but for rounding.

    Args:
        model: a hub id, a local directory, or a loaded model.
        batch_size: texts at once.
        prices: of its tokens.
        **options: further arguments of :class:`~kd_plugin.teachers.local.LocalTeacher`: ``tokenizer``, ``name``,
            ``revision``, ``license``, ``dtype``, ``device``.

    Raises:
        ConfigError: ``batch_size`` is below 1.
    """

    def __init__(self, model: Any, *, batch_size: int = 8, prices: Any = None, **options: Any) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
        self._teacher = LocalTeacher(model, **options)
        self._batch_size = batch_size
        self.name, self.prices = self._teacher.name, Prices.of(prices)

    def __repr__(self) -> str:
        return f"LocalWriter({self.source.ref!r}, name={self.name!r})"

    @property
    def source(self) -> Source:
        """What it is and under which terms."""
        return replace(self._teacher.source, signal="text")

    @property
    def identity(self) -> dict[str, Any]:
        """Its weights, by content where they are here."""
        return {"kind": "local", **self._teacher.identity}

    def gate(self, admit: Callable[[Sequence[str]], None]) -> None:
        """Do nothing: a model in this process has no other names than its source's."""

    def answers(self, asks: Iterable[tuple[Key, Ask] | None]) -> Iterator[tuple[Key, Answer]]:
        """Answer ``asks``; see :meth:`~kd_plugin.text.writers.Writer.answers`."""
        source = iter(asks)
        while True:
            # None says to answer first what was asked; where nothing was, there is nothing more to do
            batch = [one for one in _until_none(source, self._batch_size)]
            if not batch:
                return
            for _, alike in groupby(batch, key=lambda one: one[1].generation):
                group = list(alike)
                yield from zip((key for key, _ in group), self._write([ask for _, ask in group]), strict=True)

    def _write(self, asks: Sequence[Ask]) -> list[Answer]:
        tokenizer = self._teacher.tokenizer
        requests = [request_of(tokenizer, ask, self.name) for ask in asks]
        done = generate_locally(self._teacher, requests, asks[0].generation, seed=0)
        return [answer_of(tokenizer, *one) for one in zip(requests, done, strict=True)]


def prompt_tokens(tokenizer: Any, ask: Ask, name: str) -> NDArray[np.int32]:
    """Return the (P,) token ids of what is asked, by the chat template where there is one.

    Raises:
        ConfigError: a conversation, and ``name``'s tokenizer has no chat template.
    """
    if isinstance(ask.prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(ask.prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ConfigError(
            f"Writer {name!r} has no chat template, and the prompt is a conversation. Use a tuned model, or prompts "
            "that are texts."
        )
    else:
        ids = tokenizer.apply_chat_template(ask.messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    return np.asarray(ids, dtype=np.int32)


def answer_of(tokenizer: Any, request: Request, done: Completion) -> Answer:
    """Return what was generated as text, its reasoning apart."""
    text, reasoning = split_reasoning(tokenizer.decode(done.ids, skip_special_tokens=True))
    usage = Usage(len(request.prompt), len(done.ids))
    return Answer(text, reasoning, FINISHED if done.finished else TOO_LONG, usage)


def request_of(tokenizer: Any, ask: Ask, name: str) -> Request:
    """Return the completion that answers ``ask``; raises as :func:`prompt_tokens`."""
    return Request(prompt_tokens(tokenizer, ask, name), f"text/{ask.seed}", ask.generation.max_new_tokens)


def _until_none(source: Iterator[tuple[Key, Ask] | None], most: int) -> Iterator[tuple[Key, Ask]]:
    for one in islice(source, most):
        if one is None:
            return
        yield one
