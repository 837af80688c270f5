"""A student that generates some tokens at a time, with the panel's own tokens where it leaves their support.

Shape suffixes: B rows, N proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_plugin.errors import NonFiniteError

Tokens = list[int]
Propose = Callable[[list[Tokens], int], list[Tokens]]
Score = Callable[[Sequence[int], list[Tokens], list[Tokens]], list[Tensor]]


@dataclass(frozen=True)
class Interleaved:
    """A response that the student generated and the panel kept on its own support.

    Attributes:
        tokens: the response, the end-of-sequence token included where it was reached.
        replaced: one flag a token; True where the panel put its token in the place of the student's.
    """

    tokens: tuple[int, ...]
    replaced: tuple[bool, ...]


def interleave(
    prompts: Sequence[Tokens],
    propose: Propose,
    score: Score,
    *,
    max_new_tokens: int,
    block: int,
    top_k: int,
    end_tokens: Sequence[int],
    generator: torch.Generator,
    most: Callable[[int], int] = lambda count: count,
) -> list[Interleaved]:
    """Let the student generate, and replace each token that the panel ranks below ``top_k`` by one of the panel's.

    Speculative knowledge distillation (Xu et al., arXiv 2410.11325, algorithm 1): early rollouts of a weak student
    stay where the teachers' scores mean something. The student proposes some tokens at once; those before the
    first that the panel does not rank among its ``top_k`` stand; that one is drawn anew from the panel's ``top_k``
    tokens, in proportion to their probability; then the student goes on from there.

    Args:
        prompts: B prompts as token ids.
        propose: ``(prefixes, N) -> proposals``; each of 1 to N tokens, ending at an end token.
        score: ``(row numbers, prefixes, proposals) -> log-probabilities``; one (len(proposal), V) tensor a row, the
            panel's distribution at each proposed token.
        max_new_tokens: longest response.
        block: N, tokens proposed at a time. Larger blocks call the panel less often and discard more.
        top_k: rank up to which a student's token stands, from 1.
        end_tokens: ids that end a response.
        generator: CPU generator of the panel's tokens.
        most: the largest of a number over all ranks. Where weights are sharded, each rank takes part in every round
            of the others: a rank that is done has its first row proposed and scored, and puts it aside.

    Returns:
        One response a prompt.
    """
    ends = set(end_tokens)
    tokens: list[Tokens] = [[] for _ in prompts]
    replaced: list[list[bool]] = [[] for _ in prompts]
    going = [row for row in range(len(prompts)) if max_new_tokens > 0]
    while most(len(going)):
        present = going or [0]
        prefixes = [list(prompts[row]) + tokens[row] for row in present]
        room = max(1, min(block, max(max_new_tokens - len(tokens[row]) for row in present)))
        proposals = propose(prefixes, room)
        if going:
            proposals = [p[: max_new_tokens - len(tokens[row])] for row, p in zip(going, proposals, strict=True)]
        scored = score(present, prefixes, proposals)
        if not going:
            continue
        for row, proposal, logprobs in zip(going, proposals, scored, strict=True):
            accepted, substitute = _first_rejection(proposal, logprobs, top_k, generator)
            tokens[row] += proposal[:accepted] + substitute
            replaced[row] += [False] * accepted + [True] * len(substitute)
        going = [row for row in going if len(tokens[row]) < max_new_tokens and tokens[row][-1] not in ends]
    return [Interleaved(tuple(t), tuple(r)) for t, r in zip(tokens, replaced, strict=True)]


def _first_rejection(proposal: Tokens, logprobs: Tensor, top_k: int, generator: torch.Generator) -> tuple[int, Tokens]:
    """Return how many proposed tokens stand, and the panel's token for the next one (none when all stand).

    A token stands if the panel gives it a probability and ranks fewer than ``top_k`` tokens above it, so that ties at
    the last rank all stand. What a panel does not list has ``-inf`` and is not among its first ``top_k``, however few
    tokens it lists.
    """
    proposed = torch.tensor(proposal, device=logprobs.device).unsqueeze(-1)
    own, best = logprobs.gather(1, proposed), logprobs.amax(-1, keepdim=True)
    stands = (own > -torch.inf) & ((logprobs > own).sum(-1, keepdim=True) < top_k)
    # One transfer a row; whole blocks are decided at once
    stand, scored = torch.cat([stands, best > -torch.inf], dim=-1).T.tolist()
    if not all(scored):  # a NaN compares as False too
        raise NonFiniteError(
            "The panel gives no token a probability at a position of an interleaved rollout: its teachers list nothing "
            "there, or their log-probabilities are NaN. Check the weights that they run on."
        )
    if all(stand):
        return len(proposal), []
    first = stand.index(False)
    values, ids = logprobs[first].topk(min(top_k, logprobs.size(-1)))  # beyond what is listed: -inf, probability 0
    choice = int(torch.multinomial(values.float().softmax(dim=-1).cpu(), 1, generator=generator))
    return first, [int(ids[choice])]
