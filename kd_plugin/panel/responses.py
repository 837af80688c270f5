"""What the student wrote: where a response ends, which of its tokens are judged, and what responses are like.

Shape suffixes: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kd_plugin.errors import DataError
from kd_plugin.panel.guards import Responses, ends_in_loop, loop_end, repetition
from kd_plugin.panel.trace import Written


def until_end(tokens: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Return a response up to and with its first end token; all of it where there is none."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    return list(tokens[: ends[0] + 1] if ends else tokens)


def require_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts without a token, after which there is nothing to go on from.

    Args:
        prompts: token ids of B prompts.

    Raises:
        DataError: one is empty.
    """
    if not all(map(len, prompts)):
        raise DataError(
            f"{sum(not len(ids) for ids in prompts)} of {len(prompts)} prompts have no token: the text is empty, and "
            "the tokenizer begins it with none. The student cannot go on from nothing. Drop these rows, or use a chat "
            "template."
        )


def completion_ids(
    tokenizer: Any,
    row: Mapping[str, Any],
    *,
    end_tokens: Sequence[int],
    max_length: int,
    chat_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokenize a dataset's ``completion`` as it follows its ``prompt``, up to the first end of sequence.

    Args:
        tokenizer: the student's.
        row: with ``prompt`` and ``completion``, both text or both messages.
        end_tokens: ids that end a response.
        max_length: tokens that are kept.
        chat_options: further arguments of ``apply_chat_template``.

    Raises:
        DataError: no completion, or a chat template under which none can follow a prompt.
    """
    completion = row.get("completion")
    if completion is None or completion == []:
        raise DataError(
            "on_policy_fraction is below 1, but a row has no `completion` to fill in. Add the column, or let the "
            "student write all rows."
        )
    if isinstance(completion, str):
        ids = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    else:
        options = {"tokenize": True, "return_dict": False, **(chat_options or {})}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(row["prompt"] + completion, **options)
        if whole[: len(prompt)] != prompt:
            raise DataError(
                "The chat template renders a prompt otherwise when a completion follows it, so the dataset's "
                "completions cannot be mixed in. Let the student write all rows (on_policy_fraction=1)."
            )
        ids = whole[len(prompt) :]
    return until_end(ids, end_tokens)[:max_length]


def as_written(responses: Sequence[Sequence[int]], end_tokens: Sequence[int]) -> list[Written]:
    """Say of each response whether the limit cut it; the prompt is left empty, decoded only if the row is saved."""
    return [
        # Nothing was cut of a response without tokens
        Written("", tuple(row), bool(row) and row[-1] not in end_tokens, number)
        for number, row in enumerate(responses)
    ]


def judged_positions(
    used: Sequence[Sequence[int]], written: Sequence[Written], *, mask_truncated: bool
) -> list[list[int]]:
    """Return for each row the offsets of the completion's tokens that are trained on.

    Args:
        used: B rows of flags, 1 for tokens that the student wrote.
        written: the rows' responses.
        mask_truncated: leave out responses that the limit cut.
    """
    return [
        [] if mask_truncated and one.truncated else [c for c, is_used in enumerate(row) if is_used]
        for row, one in zip(used, written, strict=True)
    ]


def response_sums(written: Sequence[Written]) -> list[float]:
    """Return rows, tokens, truncated rows and repetition; their sums over all ranks go into :func:`responses_of`."""
    tokens = [one.tokens for one in written]
    return [len(tokens), sum(map(len, tokens)), sum(one.truncated for one in written), sum(map(repetition, tokens))]


def responses_of(sums: Sequence[float]) -> Responses:
    """Return the means of :func:`response_sums` for the alarm."""
    rows, tokens, cut, repeated = sums
    rows = max(rows, 1)
    return Responses(tokens / rows, cut / rows, repeated / rows)


def cut_loops(responses: Sequence[Sequence[int]], repeats: int) -> tuple[list[list[int]], float]:
    """Cut responses where a sequence has come ``repeats`` times in a row; return them, and the share that looped."""
    ends = [loop_end(ids, repeats) for ids in responses]
    share = sum(end is not None for end in ends) / max(len(ends), 1)
    return [list(ids[:end]) for ids, end in zip(responses, ends, strict=True)], share


class StopLoops(StoppingCriteria):
    """Ends rows that repeat themselves; looked at every eighth token, since :func:`cut_loops` finds the exact end.

    Args:
        start: column of the first response token.
        repeats: how often a sequence may come in a row, from 2.
    """

    row_by_row = True

    def __init__(self, start: int, repeats: int) -> None:
        self.start, self.repeats = start, repeats

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:  # noqa: D102
        if (input_ids.size(1) - self.start) % 8:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return ends_in_loop(input_ids, self.start, self.repeats)
