"""A student that generates in this process, alone or with the panel's own tokens where it leaves their support.

Shape suffixes: B rows, N proposed tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from kd_plugin.errors import NonFiniteError
from kd_plugin.rollouts import Drawn, Propose
from kd_plugin.rollouts.decoding import decode_with, generates_row_by_row, real_tokens
from kd_plugin.rollouts.rows import StopLoops, left_padded, until_end
from kd_plugin.sharding import gathered_bytes, missing_bytes, through
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)
_GIB = 1024**3
PROGRESS_SECONDS = 30.0


@dataclass(frozen=True)
class Sampling:
    """How the student generates; the names are TRL's.

    Attributes:
        max_completion_length: tokens of a response.
        temperature: 0 takes the likeliest token.
        top_p: nucleus.
        top_k: 0 for no limit.
        min_p: smallest share of the likeliest token's probability; None for no limit.
        repetition_penalty: 1 for none.
        generation_kwargs: further arguments of ``generate``.
        draws: how a token is drawn, see :func:`kd_plugin.rollouts.decoding.decode`.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    draws: str = "multinomial"

    @classmethod
    def of(cls, settings: Any) -> Sampling:
        """Return how the student generates by the settings of a panel, which have the same names."""
        further = {"cache_implementation": settings.cache_implementation} if settings.cache_implementation else {}
        return cls(
            settings.max_completion_length,
            settings.temperature,
            settings.top_p,
            settings.top_k,
            settings.min_p,
            settings.repetition_penalty,
            {**further, **(settings.generation_kwargs or {})},
            settings.rollout_draws,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        greedy = dict.fromkeys(sampled)
        return {
            "max_new_tokens": self.max_completion_length,
            "do_sample": self.temperature > 0,
            **(sampled if self.temperature > 0 else greedy),
            "repetition_penalty": self.repetition_penalty,
            **self.generation_kwargs,
        }


class InProcessEngine:
    """A :class:`~kd_plugin.rollouts.RolloutEngine` over transformers' ``generate``.

    The random state outside is left alone, so that a resumed run generates what an undisturbed one does.

    Args:
        model: the student: a transformers model, PEFT-wrapped or not.
        tokenizer: its tokenizer.
        sampling: how it generates.
        device: where the student computes.
        seed: decides all that is drawn.
        vocabulary: tokens that may be generated; None for all rows of the head.
        together: whether weights are sharded, so that each rank generates until all are done.
        around: FSDP2 units around the student, the innermost first: ``generate`` runs past what they gather.
        repeats: end responses in which a sequence comes so many times in a row; 0 is off. The loop's tail is left on.
    """

    takes_nothing = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        device: torch.device,
        seed: int,
        vocabulary: Vocabulary | None = None,
        together: bool = False,
        around: Sequence[nn.Module] = (),
        repeats: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.device = device
        self.seed = seed
        self.vocabulary = vocabulary
        self.together = together
        self.around = around
        self.repeats = repeats

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Drawn]:
        """Return a response to each of B prompts."""
        ids, mask = left_padded(prompts, pad_token(self.tokenizer))
        width = ids.shape[1]
        loops = {"stopping_criteria": StoppingCriteriaList([StopLoops(width, self.repeats)])} if self.repeats else {}
        with self._ready():
            generated = self._generate(ids, mask, **loops)
        return [Drawn(until_end(row, [self.tokenizer.eos_token_id])) for row in generated[:, width:].tolist()]

    @contextmanager
    def proposing(self) -> Iterator[Propose]:
        """Yield what has the student propose tokens."""
        with self._ready():
            yield lambda ids, mask, count: self._generate(ids, mask, max_new_tokens=count)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed)
                yield
        finally:
            self.model.train(was_training)

    def _generate(self, ids: Tensor, mask: Tensor, **further: Any) -> Tensor:
        """Return (B, P + C) prompts and what follows them; ``further`` arguments stand above those of the sampling."""
        arguments = {**self.sampling.arguments(), **further}
        config = copy.deepcopy(self.model.generation_config)
        config.update(**arguments)
        if not self.together and generates_row_by_row(config):
            arguments = {"custom_generate": decode_with(self.sampling.draws), **arguments}
        if self.vocabulary is not None:
            arguments = {**real_tokens(self.model, self.vocabulary), **arguments}
        generate = functools.partial(self.model.generate, synced_gpus=self.together, use_cache=True, **arguments)
        for unit in self.around:
            generate = functools.partial(through(unit, unit), generate)
        return generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            pad_token_id=pad_token(self.tokenizer),
            eos_token_id=self.tokenizer.eos_token_id,
        )


def pad_token(tokenizer: Any) -> int:
    """Return what fills up short rows."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Bring the random states of Python, NumPy and torch back after the block: training does not notice it."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(devices)


Tokens = list[int]
ProposeRows = Callable[[list[Tokens], int], list[Tokens]]
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
    propose: ProposeRows,
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


def slow_notice(model: nn.Module, ranks: int, *, fits: bool) -> str:
    """Say, before it begins, that generation without gathered weights is slow, and what would be faster.

    Args:
        model: the student, in parts.
        ranks: over which it is sharded.
        fits: whether gathered weights would fit; False where that is why they are not.
    """
    size = gathered_bytes(model) / _GIB
    why = "ds3_gather_for_generation is off"
    if not fits:
        why = f"gathered weights would add {missing_bytes(model) / _GIB:.1f} GiB to a rank, which has less free"
    faster = "set ds3_gather_for_generation=True" if fits else "free memory, use more ranks"
    return (
        f"The student generates with its weights sharded over {ranks} ranks, because {why}: each token gathers all "
        f"{size:.1f} GiB of it anew. That is slow, and no hang; progress is said every {PROGRESS_SECONDS:.0f} s. "
        f"Faster: {faster}, let a vLLM server generate (use_vllm=True), or train under ZeRO-2."
    )


class GenerationProgress(StoppingCriteria):
    """Says every half minute how far a generation has come; stops nothing.

    Args:
        limit: tokens that may be generated.
        says: whether this rank speaks.
    """

    def __init__(self, limit: int, *, says: bool) -> None:
        self.limit, self.says = limit, says
        self.start: int | None = None
        self.began = self.last = time.monotonic()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return that no row is done."""
        now = time.monotonic()
        if self.start is None:  # called once a token, for the first time behind the first
            self.start = input_ids.size(1) - 1
        if self.says and now - self.last >= PROGRESS_SECONDS:
            self.last, generated = now, input_ids.size(1) - self.start
            pace = generated / (now - self.began)
            logger.warning(
                "Generating without gathered weights: %d of up to %d tokens a row, %.1f tokens/s a row.",
                generated,
                self.limit,
                pace,
            )
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
