"""From a dataset row to token ids and a mask, exactly as TRL's ``SFTTrainer`` prepares it, and what a teacher is asked.

A dataset that the user trains on joins the cache by the hash of its token ids, so one token of difference
loses the row. The rules below follow ``SFTTrainer._prepare_dataset`` of TRL 1.16; a test compares the two.

In a capture for a student's tokenizer a row is rendered and tokenized as the student's training does, so that one
capture teaches every student with that tokenizer. The teacher is asked about the same response behind the prompt that
it reads: by its own template, with a solution or a hint that the student never sees. What it says of tokens that only
it has joins what is not listed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_plugin.cache.schema import Example, Extracted, example_id, scored_positions
from kd_plugin.cache.templates import MESSAGE_COLUMNS, TemplateNeeds, pinned, pinned_tokenizer, read_template
from kd_plugin.errors import ConfigError, DataError, VocabularyError
from kd_plugin.rollouts.rows import Span
from kd_plugin.views.render import Reader, Reading
from kd_plugin.vocab import SharedTokens

PASS_THROUGH = ("text", "domain")
_USED = (*MESSAGE_COLUMNS, "text", "input_ids", "completion_mask", "assistant_masks", "labels", "tools", "domain")
USED_COLUMNS = (*_USED, "chat_template_kwargs")
CANNOT_READ = "a token that the teacher has not"


class Tokenization:
    """Turns rows into examples.

    Args:
        tokenizer: a transformers tokenizer, whose chat template renders conversations.
        vocab_size: ids at or above it are refused.
        max_length: tokens kept from the start of a row; None keeps all.
        completion_only: train on completions only; None does so where rows have a prompt and a completion.
        assistant_only: train on the assistant's turns only, which the chat template marks.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_length: int | None = None,
        completion_only: bool | None = None,
        assistant_only: bool = False,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length={max_length}: a row needs at least 2 tokens to be scored. Use None for all.")
        self.tokenizer = self._renderer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.completion_only = completion_only
        self.assistant_only = assistant_only

    def rendered_at(self, moment: str | None) -> Tokenization:
        """Return the same with a chat template that prints the time ``moment``; None leaves the clock to it."""
        own = copy.copy(self)
        own._renderer = pinned_tokenizer(self.tokenizer, moment)
        return own

    def __call__(self, row: Mapping[str, Any], where: str = "a row") -> Example | None:
        """Tokenize ``row``; None when nothing of it is left to train on, which TRL drops as well.

        Args:
            row: a row of any form that ``SFTTrainer`` takes.
            where: how messages call it.

        Raises:
            DataError: the row has none of those forms.
            VocabularyError: it holds token ids that the teacher does not have.
        """
        _require_turns(row, where)
        ids, mask = self._encode(row, where)
        array = self._checked(ids, where)[: self.max_length]
        completion_mask = np.asarray(mask, dtype=np.int8)[: self.max_length]
        scored = scored_positions(completion_mask)
        if not scored.size:
            return None
        passed = {name: row.get(name) for name in PASS_THROUGH if name in row}
        return Example(example_id(array), array.astype(np.int32), completion_mask, scored, passed)

    def prompt(self, row: Mapping[str, Any], where: str = "a row") -> NDArray[np.int32]:
        """Return the ids of what a teacher is to go on from: (L,) int32.

        That is the prompt, a conversation up to the assistant's last turn, a text, or ``input_ids`` up to the first
        token of the completion; a completion that is there is left out.

        Raises:
            DataError: the row has none of those forms.
            VocabularyError: it holds token ids that the teacher does not have.
        """
        _require_turns(row, where)
        row = _as_chatml(row)
        if "input_ids" in row:
            ids, mask = self._tokenized(row, where)
            ids = ids if all(mask) else ids[: list(mask).index(1)] if any(mask) else ids
        elif "prompt" in row:
            prompt = row["prompt"]
            ids = self._plain(prompt) if isinstance(prompt, str) else self._opened(prompt, row)
        elif "messages" in row:
            messages = list(row["messages"])
            ids = self._opened(messages[:-1] if messages[-1].get("role") == "assistant" else messages, row)
        elif isinstance(row.get("text"), str):
            ids = self._plain(row["text"])
        else:
            raise DataError(
                f"{where} has the columns {sorted(row)}; expected 'prompt', 'messages', 'text' or 'input_ids' for the "
                "teacher to go on from."
            )
        return self._checked(ids, where).astype(np.int32)

    def asked_of(self, prompt: NDArray[np.int32], row: Mapping[str, Any], where: str) -> NDArray[np.int32]:
        """Return the prompt that the teacher goes on from, where the row's is ``prompt``."""
        return prompt

    def generated(
        self, prompt: NDArray[np.int32], ids: NDArray[np.int32], row: Mapping[str, Any], passed: Mapping[str, Any]
    ) -> Example:
        """Return the example of a completion that the teacher generated behind ``prompt``."""
        return Example.of(np.concatenate([prompt, ids]), len(prompt), passed)

    def kept(self, found: Extracted) -> Extracted:
        """Return what is stored of targets."""
        return found

    def why_not(self, example: Example) -> str | None:
        """Say why the teacher cannot be asked about an example; None where it can."""
        return None

    def _opened(self, messages: Sequence[Any], row: Mapping[str, Any]) -> Sequence[int]:
        """Render messages up to where the assistant speaks; a last assistant turn is a beginning to go on from."""
        goes_on = bool(messages) and messages[-1].get("role") == "assistant"
        return self._chat(messages, row, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def _checked(self, ids: Sequence[int], where: str) -> NDArray[np.int64]:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise VocabularyError(
                f"{where} has token ids from {array.min()} to {array.max()}; the teacher's go from 0 to "
                f"{self.vocab_size - 1}. Tokenize the dataset with the teacher's tokenizer; if it is that of a head "
                "with fewer rows, remove the row."
            )
        return array

    def _encode(self, row: Mapping[str, Any], where: str) -> tuple[Sequence[int], Sequence[int]]:
        if "input_ids" in row:
            return self._tokenized(row, where)
        row = _as_chatml(row)
        if "prompt" in row:
            if "completion" not in row:
                raise DataError(
                    f"{where} has a prompt and no completion. The teacher scores completions that are there: add a "
                    "'completion' column, or let the teacher write them: capture(..., generate=Generation()), "
                    "`mode: generate`."
                )
            ids, prompt_length, mask = self._prompt_completion(row, where)
            masked = prompt_length if self.completion_only in (None, True) else 0
            return ids, [0] * masked + list(mask[masked:])
        if self.completion_only:
            raise DataError(
                f"{where} has no prompt, so completion_only=True cannot tell what the completion is. "
                "Use 'prompt' and 'completion' columns, or leave completion_only out."
            )
        if "messages" in row:
            return self._masked_chat(row["messages"], row)
        elif isinstance(row.get("text"), str):
            self._require_conversation(where)
            ids = self._plain(self._with_eos(row["text"]))
        else:
            raise DataError(
                f"{where} has the columns {sorted(row)}; expected 'text', 'messages', 'prompt' and 'completion', "
                "or 'input_ids'."
            )
        return ids, [1] * len(ids)

    def _tokenized(self, row: Mapping[str, Any], where: str) -> tuple[Sequence[int], Sequence[int]]:
        ids = row["input_ids"]
        if row.get("labels") is not None:
            mask = [int(label != -100) for label in row["labels"]]
        else:
            mask = [1] * len(ids)
            columns = ["assistant_masks"] if self.completion_only is False else ["completion_mask", "assistant_masks"]
            for column in columns:
                if row.get(column) is not None:
                    if len(row[column]) != len(ids):
                        raise DataError(f"{where}: {column} has {len(row[column])} entries for {len(ids)} input_ids.")
                    mask = [int(a and b) for a, b in zip(mask, row[column], strict=True)]
            if self.assistant_only and row.get("assistant_masks") is None:
                self._require_conversation(where)
        if len(mask) != len(ids):
            raise DataError(f"{where}: labels has {len(mask)} entries for {len(ids)} input_ids.")
        return ids, mask

    def _prompt_completion(self, row: Mapping[str, Any], where: str) -> tuple[Sequence[int], int, Sequence[int]]:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(f"{where}: prompt and completion must both be strings or both be lists of messages.")
        if isinstance(prompt, str):
            self._require_conversation(where)
            prompt_ids = self._plain(prompt)
            ids = self._plain(prompt + self._with_eos(completion))
            mask: Sequence[int] = [1] * len(ids)
        else:
            prompt_ids = self._chat(prompt, row, add_generation_prompt=True)
            ids, mask = self._masked_chat(list(prompt) + list(completion), row)
        # A template may render the prompt alone differently; the completion starts where the two part.
        common = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), None)
        return ids, min(len(prompt_ids), len(ids)) if common is None else common, mask

    def _require_conversation(self, where: str) -> None:
        if self.assistant_only:
            raise DataError(
                f"{where} is no conversation, so assistant_only=True cannot tell what the assistant says. Use "
                "messages, or 'input_ids' with 'assistant_masks' or 'labels', or leave assistant_only out."
            )

    def _with_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ConfigError("The tokenizer has no eos_token, so a text's end cannot be taught. Set one.")
        return text if text.endswith(eos) else text + eos

    def _plain(self, text: str) -> Sequence[int]:
        return self.tokenizer(text=text)["input_ids"]

    def _masked_chat(self, messages: Sequence[Any], row: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int]]:
        """Render a whole conversation; with ``assistant_only`` the mask is 1 at the assistant's tokens."""
        if not self.assistant_only:
            ids = self._chat(messages, row)
            return ids, [1] * len(ids)
        rendered = self._rendered(messages, row, return_assistant_tokens_mask=True)
        return rendered["input_ids"], rendered["assistant_masks"]

    def _chat(self, messages: Sequence[Any], row: Mapping[str, Any], **options: Any) -> Sequence[int]:
        ids: Sequence[int] = self._rendered(messages, row, **options)["input_ids"]
        return ids

    def _rendered(self, messages: Sequence[Any], row: Mapping[str, Any], **options: Any) -> Any:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        given = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        own = given.get("chat_template")
        if own and read_template(own) != TemplateNeeds():
            raise DataError(
                "A row's chat_template_kwargs hold a chat template that prints the time, or depends on chance: its "
                "tokens would be others in training. Give one template to all rows: capture(..., chat_template=...)."
            )
        return self._renderer.apply_chat_template(messages, tokenize=True, return_dict=True, **options, **given)


def _require_turns(row: Mapping[str, Any], where: str) -> None:
    """Refuse a conversation without a turn, which no template renders; an empty text is a text."""
    for column in ("prompt", "messages", "conversations"):
        turns = row.get(column)
        if "input_ids" in row or turns is None or isinstance(turns, str):
            continue
        if not hasattr(turns, "__len__"):
            raise DataError(f"{where}: {column!r} is {turns!r}; expected text, or a list of messages.")
        if not len(turns):
            raise DataError(f"{where}: {column!r} is a conversation without a turn. Remove the row, or add a message.")


def _as_chatml(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translate ``conversations`` of from/value into ``messages`` of role/content."""
    conversations = row.get("conversations")
    if conversations is None:
        return row
    if not all(isinstance(message, Mapping) for message in conversations):
        return row
    renamed = {"from": "role", "value": "content"}
    messages = [{renamed.get(key, key): value for key, value in message.items()} for message in conversations]
    return {**{key: value for key, value in row.items() if key != "conversations"}, "messages": messages}


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

    def generated(
        self, prompt: NDArray[np.int32], ids: NDArray[np.int32], row: Mapping[str, Any], passed: Mapping[str, Any]
    ) -> Example:
        """Return the student's example of a completion that the teacher generated."""
        return self._read(super().generated(prompt, ids, row, passed), row, "a completion")

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
