"""The panel's own next-token distribution, where a rollout needs it before there is a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.divergence.projection import exact_logits
from kd_plugin.panel.roster import Assignment, TeacherPanel
from kd_plugin.panel.scoring import Signal, score_rows
from kd_plugin.rollouts.in_process import interleave
from kd_plugin.rollouts.responses import until_end
from kd_plugin.rollouts.rows import left_padded, seeded
from kd_plugin.sharding.gathering import gathered_heads, most_of_any_rank
from kd_plugin.signals import HiddenSignal, shared_mask
from kd_plugin.views.chunks import ChunkSignal
from kd_plugin.vocab import Vocabulary

_INTERLEAVED = 1 << 20  # added to a rank: keeps its generator apart from that of the on-policy rows


@dataclass(frozen=True)
class InterleavedSettings:
    """How the student generates while the panel replaces tokens outside its support.

    Attributes:
        max_new_tokens: longest response.
        block: tokens proposed before the panel is asked.
        top_k: rank up to which the panel lets a token stand.
        end_tokens: ids that end a response.
        pad_token_id: fills up short rows.
        rows_at_once: rows in a teacher's forward pass.
    """

    max_new_tokens: int
    block: int
    top_k: int
    end_tokens: Sequence[int]
    pad_token_id: int
    rows_at_once: int


def interleaved_responses(
    panel: TeacherPanel,
    assignments: Sequence[Assignment],
    prompts: Sequence[list[int]],
    generate: Callable[[Tensor, Tensor, int], Tensor],
    settings: InterleavedSettings,
    *,
    vocabulary: Vocabulary,
    device: torch.device,
    step: int,
    seed: int,
    rank: int = 0,
) -> tuple[list[list[int]], float]:
    """Let the student respond to ``prompts``; see :func:`kd_plugin.rollouts.in_process.interleave`.

    Args:
        panel: the teachers.
        assignments: for each prompt who scores it.
        prompts: token ids.
        generate: ``(ids, mask, N) -> ids`` of the prompts and up to N tokens more, all on ``device``.
        settings: see there.
        vocabulary: of the run; V tokens.
        device: of the student and the teachers' inputs.
        step: optimizer step, for weights with a schedule.
        seed: of the run.
        rank: of this process. All ranks call this together, for shards of the student or of teachers.

    Returns:
        The responses, and the share of their tokens that the panel put in.
    """

    def propose(prefixes: list[list[int]], count: int) -> list[list[int]]:
        ids, mask = left_padded(prefixes, settings.pad_token_id)
        output = generate(ids.to(device), mask.to(device), count)
        return [until_end(row, settings.end_tokens) for row in output[:, ids.shape[1] :].tolist()]

    def score(numbers: Sequence[int], prefixes: list[list[int]], proposals: list[list[int]]) -> list[Tensor]:
        return panel_logprobs(
            panel,
            [assignments[number] for number in numbers],
            prefixes,
            proposals,
            vocabulary=vocabulary,
            pad_token_id=settings.pad_token_id,
            device=device,
            rows_at_once=settings.rows_at_once,
            step=step,
        )

    responses = interleave(
        prompts,
        propose,
        score,
        max_new_tokens=settings.max_new_tokens,
        block=settings.block,
        top_k=settings.top_k,
        end_tokens=settings.end_tokens,
        generator=seeded(seed, step, _INTERLEAVED + rank),
        most=lambda count: most_of_any_rank([count], device)[0],
    )
    replaced = sum(sum(response.replaced) for response in responses)
    tokens = sum(len(response.tokens) for response in responses)
    return [list(response.tokens) for response in responses], replaced / max(tokens, 1)


@torch.no_grad()
def panel_logprobs(
    panel: TeacherPanel,
    assignments: Sequence[Assignment],
    prefixes: Sequence[Sequence[int]],
    proposals: Sequence[Sequence[int]],
    *,
    vocabulary: Vocabulary,
    pad_token_id: int,
    device: torch.device,
    rows_at_once: int,
    step: int = 0,
) -> list[Tensor]:
    """Return log Σ wᵢ·pᵢ at each proposed token, the mixture of those who score the row.

    Args:
        panel: the teachers.
        assignments: for each row who scores it.
        prefixes: token ids before the proposal.
        proposals: token ids whose places are scored; at least one a row.
        vocabulary: of the run; V tokens.
        pad_token_id: fills up short rows.
        device: where the teachers take their inputs.
        rows_at_once: rows in a teacher's forward pass.
        step: optimizer step, for weights with a schedule.

    Returns:
        For each row (len(proposal), V) nats; ``-inf`` for what a teacher that lists only some tokens leaves out, and
        for tokens that it does not share with the student.
    """
    start, width = max(map(len, prefixes)), max(map(len, proposals))
    ids = torch.full((len(prefixes), start + width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (prefix, proposal) in enumerate(zip(prefixes, proposals, strict=True)):
        used = slice(start - len(prefix), start + len(proposal))
        ids[row, used] = torch.tensor([*prefix, *proposal])
        mask[row, used] = 1
    scores = score_rows(
        panel,
        assignments,
        ids.to(device),
        mask.to(device),
        completion_start=start,
        positions=[range(len(proposal)) for proposal in proposals],
        rows_at_once=rows_at_once,
        vocabulary=vocabulary,
    )
    found = []
    sharded = panel.sharded_heads()
    with gathered_heads(list(sharded.values())) as heads:
        opened = dict(zip(sharded, heads, strict=True))
        for assignment, row_scores in zip(assignments, scores, strict=True):
            weights, signals = panel.weights_of(assignment, step), row_scores.with_heads(opened).distributions
            terms = [
                _logprobs(signals[name], vocabulary.size) + torch.tensor(weight).log()
                for name, weight in zip(assignment.teachers, weights, strict=True)
                if weight > 0
            ]
            found.append(torch.stack(terms).logsumexp(dim=0))
    return found


def _logprobs(signal: Signal, vocab_size: int) -> Tensor:
    assert not isinstance(signal, ChunkSignal)  # a panel with views does not interleave
    if isinstance(signal, HiddenSignal):
        logits = exact_logits(signal.head, signal.hidden)
        if signal.shared is not None:
            ids = torch.arange(logits.shape[1], device=logits.device)
            logits = logits.masked_fill_(~shared_mask(signal.shared, ids), -torch.inf)
            logits = torch.nn.functional.pad(logits, (0, max(vocab_size - logits.shape[1], 0)), value=-torch.inf)
        return logits[:, :vocab_size].log_softmax(dim=-1)
    full = signal.logprobs.new_full((len(signal), vocab_size), -torch.inf)
    return full.scatter_reduce(1, signal.ids, signal.logprobs, reduce="amax")
