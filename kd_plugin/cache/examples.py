"""From a dataset row to token ids and a mask, exactly as TRL's ``SFTTrainer`` prepares it.

A dataset that the user trains on joins the cache by the hash of its token ids, so one token of difference
loses the row. The rules below follow ``SFTTrainer._prepare_dataset`` of TRL 1.16; a test compares the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.errors import ConfigError, DataError, VocabularyError

PASS_THROUGH = ("text", "domain")
_MESSAGE_COLUMNS = ("prompt", "completion", "messages", "conversations")
_USED = (*_MESSAGE_COLUMNS, "text", "input_ids", "completion_mask", "assistant_masks", "labels", "tools", "domain")
USED_COLUMNS = (*_USED, "chat_template_kwargs")


@dataclass(frozen=True)
class Example:
    """A row as it is scored. L tokens.

    Attributes:
        example_id: see :func:`example_id`.
        input_ids: (L,) int32.
        completion_mask: (L,) int8, 1 for tokens that are trained on.
        scored: (N,) int64, positions t whose token t+1 is trained on.
        passed: the columns that pass through, such as ``text`` and ``domain``.
    """

    example_id: str
    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.int8]
    scored: NDArray[np.int64]
    passed: Mapping[str, str | None]

    @classmethod
    def of(cls, ids: NDArray[np.int32], prompt_length: int, passed: Mapping[str, str | None]) -> Example:
        """Return the example of a prompt of so many tokens and a completion."""
        mask = np.ones(len(ids), np.int8)
        mask[:prompt_length] = 0
        return cls(example_id(ids), ids, mask, scored_positions(mask), passed)


def example_id(input_ids: Sequence[int] | NDArray[Any]) -> str:
    """Return the name of a token sequence: 32 hexadecimal digits, the same on every machine.

    It is the first half of the SHA-256 of the ids written as 4-byte little-endian integers.
    """
    return hashlib.sha256(np.asarray(input_ids, dtype="<i4").tobytes()).hexdigest()[:32]


def scored_positions(completion_mask: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the positions t, in order, whose token t+1 has a mask of 1."""
    return np.flatnonzero(completion_mask[1:]).astype(np.int64)


class Tokenization:
    """Turns rows into examples.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: ids at or above it are refused.
        max_length: tokens kept from the start of a row; None keeps all.
        completion_only: train on completions only; None does so where rows have a prompt and a completion.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_length: int | None = None,
        completion_only: bool | None = None,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length={max_length}: a row needs at least 2 tokens to be scored. Use None for all.")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.completion_only = completion_only

    def __call__(self, row: Mapping[str, Any], where: str = "a row") -> Example | None:
        """Tokenize ``row``; None when nothing of it is left to train on, which TRL drops as well.

        Args:
            row: a row of any form that ``SFTTrainer`` takes.
            where: how messages call it.

        Raises:
            DataError: the row has none of those forms.
            VocabularyError: it holds token ids that the teacher does not have.
        """
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

    def _opened(self, messages: Sequence[Any], row: Mapping[str, Any]) -> Sequence[int]:
        """Render messages up to where the assistant speaks; a last assistant turn is a beginning to go on from."""
        goes_on = bool(messages) and messages[-1].get("role") == "assistant"
        return self._chat(messages, row, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def _checked(self, ids: Sequence[int], where: str) -> NDArray[np.int64]:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise VocabularyError(
                f"{where} has token ids from {array.min()} to {array.max()}; the teacher's go from 0 to "
                f"{self.vocab_size - 1}. Tokenize the dataset with the teacher's tokenizer."
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
            ids, prompt_length = self._prompt_completion(row, where)
            masked = prompt_length if self.completion_only in (None, True) else 0
            return ids, [0] * masked + [1] * (len(ids) - masked)
        if self.completion_only:
            raise DataError(
                f"{where} has no prompt, so completion_only=True cannot tell what the completion is. "
                "Use 'prompt' and 'completion' columns, or leave completion_only out."
            )
        if "messages" in row:
            ids = self._chat(row["messages"], row)
        elif isinstance(row.get("text"), str):
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
        if len(mask) != len(ids):
            raise DataError(f"{where}: labels has {len(mask)} entries for {len(ids)} input_ids.")
        return ids, mask

    def _prompt_completion(self, row: Mapping[str, Any], where: str) -> tuple[Sequence[int], int]:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(f"{where}: prompt and completion must both be strings or both be lists of messages.")
        if isinstance(prompt, str):
            prompt_ids = self._plain(prompt)
            ids = self._plain(prompt + self._with_eos(completion))
        else:
            prompt_ids = self._chat(prompt, row, add_generation_prompt=True)
            ids = self._chat(list(prompt) + list(completion), row)
        # A template may render the prompt alone differently; the completion starts where the two part.
        common = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), None)
        return ids, min(len(prompt_ids), len(ids)) if common is None else common

    def _with_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ConfigError("The tokenizer has no eos_token, so a text's end cannot be taught. Set one.")
        return text if text.endswith(eos) else text + eos

    def _plain(self, text: str) -> Sequence[int]:
        return self.tokenizer(text=text)["input_ids"]

    def _chat(self, messages: Sequence[Any], row: Mapping[str, Any], **options: Any) -> Sequence[int]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            tools=tools,
            **options,
            **(row.get("chat_template_kwargs") or {}),
        )["input_ids"]


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
