"""Rows of a generation batch: who fills them, where they have their tokens, and batches without needless padding.

A generation batch is as wide as its longest prompt and its longest completion together. A forward pass over some of its
rows needs the width of the longest of them: a causal model gives a row's tokens the same hidden states wherever its
padding is.

Shape suffixes: B rows, L columns, W columns of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_plugin.rollouts import Drawn
from kd_plugin.rollouts.responses import Response, as_responses, require_prompts


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
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return ids, mask


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
