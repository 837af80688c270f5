"""Rows of a generation batch: who fills them, where responses end, which tokens count, and batches without padding.

A generation batch is as wide as its longest prompt and its longest completion together. A forward pass over some of its
rows needs the width of the longest of them: a causal model gives a row's tokens the same hidden states wherever its
padding is.

Shape suffixes: B rows, L columns, W columns of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from kd_plugin.errors import DataError
from kd_plugin.rollouts import Drawn

LONGEST_LOOP = 32  # tokens of the sequence that repeats


@dataclass(frozen=True)
class Response:
    """What followed a prompt.

    Attributes:
        tokens: its token ids, scored or not.
        truncated: whether the limit cut it.
        number: its place in the generation batch, as it was drawn from the dataset.
    """

    tokens: tuple[int, ...]
    truncated: bool
    number: int = 0


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
            "student generate all rows."
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
                "completions cannot be mixed in. Let the student generate all rows (on_policy_fraction=1)."
            )
        ids = whole[len(prompt) :]
    return until_end(ids, end_tokens)[:max_length]


def as_responses(responses: Sequence[Sequence[int]], end_tokens: Sequence[int]) -> list[Response]:
    """Say of each response whether the limit cut it."""
    return [
        # Nothing was cut of a response without tokens
        Response(tuple(row), bool(row) and row[-1] not in end_tokens, number)
        for number, row in enumerate(responses)
    ]


def scored_offsets(
    used: Sequence[Sequence[int]], responses: Sequence[Response], *, mask_truncated: bool
) -> list[list[int]]:
    """Return for each row the offsets of the completion's tokens that are trained on.

    Args:
        used: B rows of flags, 1 for tokens that count.
        responses: one a row.
        mask_truncated: leave out responses that the limit cut.
    """
    return [
        [] if mask_truncated and one.truncated else [c for c, is_used in enumerate(row) if is_used]
        for row, one in zip(used, responses, strict=True)
    ]


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


def loop_end(tokens: Sequence[int], repeats: int, longest: int = LONGEST_LOOP) -> int | None:
    """Return how many tokens there are when a sequence has come ``repeats`` times in a row, or None.

    Args:
        tokens: a response.
        repeats: from 2.
        longest: tokens of the longest sequence that is looked for.
    """
    ids = np.asarray(tokens)
    ends = []
    for period in range(1, min(longest, len(ids) // repeats) + 1):
        needed = period * (repeats - 1)  # tokens in a row that equal the one a period before
        equal = np.concatenate([[0], np.cumsum(ids[period:] == ids[:-period])])
        found = np.flatnonzero(equal[needed:] - equal[: len(equal) - needed] == needed)
        if found.size:
            ends.append(int(found[0]) + needed + period)
    return min(ends, default=None)


def ends_in_loop(input_ids: Tensor, start: int, repeats: int, longest: int = LONGEST_LOOP) -> Tensor:
    """Return (B,) whether each response ends in a sequence that came ``repeats`` times; for use while it is generated.

    Args:
        input_ids: (B, L) prompts and responses.
        start: column of the first response token.
        repeats: from 2.
        longest: tokens of the longest sequence that is looked for.
    """
    generated = input_ids[:, start:]
    looping = torch.zeros(len(generated), dtype=torch.bool, device=input_ids.device)
    for period in range(1, min(longest, generated.size(1) // repeats) + 1):
        tail = generated[:, -period * repeats :]
        looping = looping | (tail[:, period:] == tail[:, :-period]).all(dim=1)
    return looping


def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """Return the share of a response's n-grams that stood in it before: 0 for none, near 1 for a loop."""
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class Span(NamedTuple):
    """The columns of a row that hold its tokens: ``first`` up to and without ``stop``."""

    first: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.first


def row_spans(attention_mask: Tensor) -> list[Span]:
    """Return where each row of (B, L) has its tokens, which follow one another; waits for the device once."""
    used = attention_mask != 0
    first = used.int().argmax(dim=1)
    stop = attention_mask.shape[1] - used.flip(1).int().argmax(dim=1)
    return [Span(*span) for span in torch.stack([first, stop], dim=1).tolist()]


def left_aligned(input_ids: Tensor, attention_mask: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Return (B, W) ids and their mask with every row's first token in column 0.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L).
        spans: of the B rows.
    """
    width = max(span.length for span in spans)
    device = input_ids.device
    columns = torch.tensor([span.first for span in spans]).to(device, non_blocking=True).unsqueeze(1)
    columns = columns + torch.arange(width, device=device)
    # Beyond a row's end there is padding, or nothing
    inside = columns < attention_mask.shape[1]
    columns = columns.clamp(max=attention_mask.shape[1] - 1)
    return input_ids.gather(1, columns), attention_mask.gather(1, columns) * inside


def by_length(lengths: Sequence[int], order: Sequence[int] | None = None) -> list[int]:
    """Return row numbers, the longest row first: what does not fit into memory shows at once.

    Args:
        lengths: of the rows.
        order: decides between rows of one length; left out, it is the order of the rows.
    """
    rows = range(len(lengths)) if order is None else order
    return sorted(rows, key=lambda row: -lengths[row])


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return B token lists as (B, L) ids and their mask, padded on the left as generation needs them; on the CPU."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_token_id)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def on_policy_rows(rows: int, fraction: float, *, seed: int, step: int, rank: int = 0) -> list[bool]:
    """Choose the rows of a generation batch that the student generates; the dataset's completions fill the others.

    The number is ``rows * fraction``, rounded up or down so that it is right on average over steps. The choice
    is a function of the arguments alone, so that a resumed run repeats it.

    Args:
        rows: rows of this rank's generation batch.
        fraction: share that the student generates, in [0, 1].
        seed: of the run.
        step: optimizer step that the batch is generated for.
        rank: of this process.

    Returns:
        One flag a row; True where the student generates.
    """
    generator = seeded(seed, step, rank)
    wanted = rows * fraction
    count = int(wanted) + int(torch.rand((), generator=generator) < wanted - int(wanted))
    chosen = set(torch.randperm(rows, generator=generator)[:count].tolist())
    return [row in chosen for row in range(rows)]


def mixed_seed(seed: int, step: int, rank: int = 0, draw: int = 0) -> int:
    """Return one seed of a run's seed, the optimizer step, the rank, and which draw of that step it is."""
    return ((seed * 1_000_003 + step) * 65_537 + draw * 4_099 + rank) % (1 << 63)


def seeded(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on the three numbers alone."""
    return torch.Generator().manual_seed(mixed_seed(seed, step, rank))


def render(tokenizer: Any, prompts: Sequence[Any], chat_options: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Tokenize prompts, text or messages, as TRL does.

    Raises:
        DataError: a prompt has no token.
    """
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, **(chat_options or {})}
    rendered = [
        list(tokenizer(text=prompt)["input_ids"])
        if isinstance(prompt, str)
        else list(tokenizer.apply_chat_template(prompt, **options)["input_ids"])
        for prompt in prompts
    ]
    require_prompts(rendered)
    return rendered


@dataclass(frozen=True)
class Rollouts:
    """B prompts, padded on the left to P columns, and the responses to them, padded on the right.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) 1 for tokens.
        completion_start: P, the column of the first response token.
        responses: one a row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_start: int
    responses: tuple[Response, ...]


def assembled(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    end_tokens: Sequence[int],
    pad_token_id: int,
    device: torch.device,
) -> Rollouts:
    """Put B responses behind their prompts, on ``device``."""
    ids, mask = left_padded(prompts, pad_token_id)
    start, room = ids.shape[1], (0, max(map(len, responses), default=0))
    ids, mask = (torch.nn.functional.pad(t, room, value=value) for t, value in ((ids, pad_token_id), (mask, 0)))
    for row, response in enumerate(responses):
        ids[row, start : start + len(response)] = torch.tensor(response, dtype=ids.dtype)
        mask[row, start : start + len(response)] = 1
    return Rollouts(ids.to(device), mask.to(device), start, tuple(as_responses(responses, end_tokens)))


def behaviour_logprobs(drawn: Sequence[Drawn], width: int, device: torch.device) -> Tensor | None:
    """Return (B, ``width``) nats of response tokens where they were drawn, 0 at padding; None if a row lacks them."""
    told = [one.logprobs for one in drawn]
    if not drawn or any(one is None for one in told):
        return None
    found = torch.zeros(len(drawn), width)
    for row, values in enumerate(told):
        found[row, : len(values or ())] = torch.tensor(values, dtype=torch.float32)
    return found.to(device)
