"""Top-k log-probabilities in the form that Axolotl's KD plugin takes (``axolotl.integrations.kd``; read at 0.19).

A row has ``messages`` and a column of log-probabilities, one list for each token of the answer: of mappings with
``token`` (``token_id:123``) and ``logprob``, or of numbers beside a column ``target_token_ids``. Nothing says which
token of the conversation each list is for. Axolotl takes the last ones of the rendered conversation; a template that
prints anything after the end of the answer, as ChatML's line break, makes that off by as many tokens. Here the place
is found in the data: a teacher lists the tokens that it wrote, so at the right place nearly every token is in its
list.

What Axolotl itself has prepared (``target_logprobs``) is refused: there the listed tokens were scaled to one, and
what the teacher gave to all others is lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.errors import DataError
from kd_plugin.importing.teacher import StoredTargets
from kd_plugin.inputs import load_rows

_ENDINGS = range(9)  # tokens that a template may print after the answer
_ROWS = 256  # read to find the place
_FITS, _APART = 0.9, 0.3  # share of tokens that are in their list: at the right place, and less than that elsewhere


class AxolotlOutputs:
    """A dataset in the form that Axolotl reads; see :class:`~kd_plugin.importing.teacher.StoredOutputs`.

    Args:
        reference: a file, a directory or a hub id.
        tokenizer: whose chat template renders the conversations, as it did for the teacher.
        logprobs_field: the column of log-probabilities.
        messages_field: the column of the conversation.
        split: of a hub dataset.
        temperature: by which the teacher's logits were divided.

    Raises:
        DataError: the rows are of another form, or which token a list is for cannot be known.
    """

    def __init__(
        self,
        reference: str,
        tokenizer: Any,
        *,
        logprobs_field: str = "logprobs",
        messages_field: str = "messages",
        split: str = "train",
        temperature: float = 1.0,
    ) -> None:
        self.dataset, self.temperature = load_rows(reference, split=split), temperature
        self._tokenizer, self._logprobs, self._messages = tokenizer, logprobs_field, messages_field
        _require_columns(self.dataset.column_names, logprobs_field, messages_field)
        self._conversations = self.dataset.select_columns([messages_field])
        looked = range(0, len(self.dataset), max(1, len(self.dataset) // _ROWS))
        lists = {row: self._lists(row) for row in looked}
        self.listed = max(ids.shape[1] for ids, _ in lists.values())
        self.ending, self.share = self._place(lists)
        self.identity: Mapping[str, Any] = {
            "format": "axolotl",
            "rows": len(self.dataset),
            "first": hashlib.sha256(json.dumps(self.tokens(0)).encode()).hexdigest(),
            "ending": self.ending,
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def tokens(self, row: int) -> Sequence[int]:
        """Return the tokens of the rendered conversation, to the end of the answer."""
        ids = self._rendered(row)
        return ids[: len(ids) - self.ending]

    def scored(self, row: int) -> range:
        """Return the positions before the answer's tokens.

        Raises:
            DataError: more was stored than the conversation has tokens.
        """
        lists, tokens = self._lists(row)[0], len(self.tokens(row))
        if len(lists) >= tokens:
            raise DataError(
                f"Row {row} has {len(lists)} lists for {tokens} tokens; expected fewer. Was it rendered by another "
                "template?"
            )
        return range(tokens - 1 - len(lists), tokens - 1)

    def row(self, row: int) -> StoredTargets:
        """Return what was stored of an answer.

        Raises:
            DataError: it lists more tokens than the rows that were looked at first.
        """
        ids, logprobs = self._lists(row)
        if ids.shape[1] > self.listed:
            raise DataError(f"Row {row} lists {ids.shape[1]} tokens at a position; expected at most {self.listed}.")
        return StoredTargets(ids, logprobs)

    def _rendered(self, row: int) -> list[int]:
        messages = self._conversations[row][self._messages]
        found = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        return list(found)

    def _lists(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return token ids and log-probabilities (N, K) of a row, by falling probability; leading gaps are dropped."""
        found = self.dataset[row]
        lists, separate = found[self._logprobs] or [], found.get("target_token_ids")
        empty = next((at for at, one in enumerate(lists) if one), len(lists))
        pairs = [
            _pairs(one, separate[at] if separate else None, row, at) for at, one in enumerate(lists) if at >= empty
        ]
        if not pairs or not all(pairs):
            raise DataError(f"Row {row} has a token without a list in {self._logprobs!r}, after its first.")
        width = max(map(len, pairs))
        ids = np.zeros((len(pairs), width), np.int64)
        logprobs = np.full((len(pairs), width), -np.inf, np.float32)
        for at, one in enumerate(pairs):
            ids[at, : len(one)], logprobs[at, : len(one)] = zip(*one, strict=True)
        return ids, logprobs

    def _place(self, lists: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]]) -> tuple[int, float]:
        """Return how many tokens stand after the answer, and the share of tokens that are in their list then."""
        rendered = {row: self._rendered(row) for row in lists}
        shares = []
        for ending in _ENDINGS:
            hits = [
                hit
                for row, (ids, _) in lists.items()
                if len(rendered[row]) - ending - len(ids) >= 1
                for hit in _hits(rendered[row][len(rendered[row]) - ending - len(ids) :], ids)
            ]
            shares.append(sum(hits) / len(hits) if hits else 0.0)
        best = int(np.argmax(shares))
        others = max((share for ending, share in enumerate(shares) if ending != best), default=0.0)
        if shares[best] < _FITS or shares[best] - others < _APART:
            shown = ", ".join(f"{ending}: {share:.0%}" for ending, share in zip(_ENDINGS, shares, strict=True))
            raise DataError(
                "Which token each list is for cannot be known: with so many tokens after the answer, so many of its "
                f"tokens are in their lists: {shown}. Expected one place with {_FITS:.0%} and more, and {_APART:.0%} "
                "less elsewhere. Is the tokenizer the teacher's, and did the teacher write the answers?"
            )
        return best, shares[best]


def _hits(tokens: Sequence[int], ids: NDArray[np.int64]) -> list[bool]:
    return [bool((row == token).any()) for token, row in zip(tokens, ids, strict=False)]


def _pairs(entries: Any, separate: Any, row: int, at: int) -> list[tuple[int, float]]:
    """Return a position's tokens and log-probabilities, by falling probability."""
    try:
        if separate is not None:
            found = [(int(token), float(value)) for token, value in zip(separate, entries or (), strict=True)]
        else:
            found = [(int(one["token"].split(":")[1]), float(one["logprob"])) for one in entries or ()]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"Row {row}, position {at}: {str(entries)[:120]} is no list of mappings with token (token_id:123) and "
            "logprob, nor of numbers beside target_token_ids."
        ) from error
    return sorted(found, key=lambda pair: -pair[1])


def _require_columns(columns: Sequence[str], logprobs_field: str, messages_field: str) -> None:
    if "target_logprobs" in columns:
        raise DataError(
            "These rows were prepared by Axolotl: the listed tokens were scaled to one (and to kd_temperature), so "
            "that what the teacher gave to all others is lost. Import the dataset that they were prepared from."
        )
    missing = [name for name in (logprobs_field, messages_field) if name not in columns]
    if missing:
        raise DataError(
            f"The rows have no column {' and no '.join(missing)}; they have {', '.join(columns)}. Name them: "
            "--logprobs_field, --messages_field."
        )
