"""Letting the student write, on any strategy, the same on a resumed run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import StoppingCriteriaList

from kd_plugin.lightning.student import shards_the_student
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.decoding import decode_with, generates_row_by_row, real_tokens
from kd_plugin.rollouts.responses import StopLoops, require_prompts, until_end
from kd_plugin.rollouts.rows import left_padded
from kd_plugin.sharding.inference import through
from kd_plugin.vocab import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the student writes; the names are TRL's.

    Attributes:
        max_completion_length: tokens of an answer.
        temperature: 0 writes greedily.
        top_p: nucleus.
        top_k: 0 for no limit.
        min_p: smallest share of the likeliest token's probability; None for no limit.
        repetition_penalty: 1 for none.
        generation_kwargs: further arguments of ``generate``.
        draws: how a token is drawn, see :func:`kd_plugin.rollouts.decoding.decode`.
        vocabulary: tokens that may be written; None for all rows of the head.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    draws: str = "multinomial"
    vocabulary: Vocabulary | None = None

    @classmethod
    def of(cls, settings: PanelSettings) -> Sampling:
        """Return how the student generates by the settings of a panel."""
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


@dataclass(frozen=True)
class Rollouts:
    """What was written. B rows, P prompt columns padded on the left, C completion columns padded on the right.

    Attributes:
        input_ids: (B, P + C).
        attention_mask: (B, P + C).
        completion_start: P.
        prompt_lengths: tokens of each prompt.
        lengths: tokens of each completion, its end-of-sequence token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_start: int
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]

    def labels(self) -> Tensor:
        """Return (B, P + C) the completions' tokens, -100 elsewhere."""
        labels = self.input_ids.masked_fill(self.attention_mask == 0, -100)
        labels[:, : self.completion_start] = -100
        return labels

    def responses(self) -> list[list[int]]:
        """Return the completions' tokens, on the host."""
        rows = self.input_ids[:, self.completion_start :].tolist()
        return [row[:length] for row, length in zip(rows, self.lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> Rollouts:
        """Return some of the rows, cut to their own longest prompt and completion."""
        prompts, lengths = (tuple(given[row] for row in rows) for given in (self.prompt_lengths, self.lengths))
        start = max(prompts, default=0)
        columns = slice(self.completion_start - start, self.completion_start + max(lengths, default=0))
        index = torch.tensor(rows, dtype=torch.int64).to(self.input_ids.device, non_blocking=True)
        ids, mask = (t[:, columns].index_select(0, index) for t in (self.input_ids, self.attention_mask))
        return Rollouts(ids, mask, start, prompts, lengths)


def assembled(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, device: Any) -> Rollouts:
    """Put B responses behind their prompts, on ``device``."""
    ids, mask = left_padded(prompts, pad)
    start, lengths = ids.shape[1], tuple(map(len, responses))
    room = (0, max(lengths, default=0))
    ids, mask = (torch.nn.functional.pad(tensor, room, value=value) for tensor, value in ((ids, pad), (mask, 0)))
    for row, response in enumerate(responses):
        ids[row, start : start + len(response)] = torch.tensor(response, dtype=ids.dtype)
        mask[row, start : start + len(response)] = 1
    return Rollouts(ids.to(device), mask.to(device), start, tuple(map(len, prompts)), lengths)


def pad_token(tokenizer: Any) -> int:
    """Return what fills up short rows."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def render(tokenizer: Any, prompts: Sequence[Any], chat_options: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Tokenize prompts, text or messages, as TRL does."""
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, **(chat_options or {})}
    rendered = [
        list(tokenizer(text=prompt)["input_ids"])
        if isinstance(prompt, str)
        else list(tokenizer.apply_chat_template(prompt, **options)["input_ids"])
        for prompt in prompts
    ]
    require_prompts(rendered)
    return rendered


@contextmanager
def writing(module: LightningModule, model: Any, seed: int) -> Iterator[None]:
    """Have ``model`` ready to write inside the block, with random numbers that depend on ``seed`` alone.

    The random state outside is left alone, so that a resumed run writes what an undisturbed one writes.
    """
    device = module.device
    was_training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def generated(
    module: LightningModule,
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    **further: Any,
) -> Tensor:
    """Return (B, P + C) prompts and what ``model`` writes behind them; call it inside :func:`writing`.

    Under ZeRO-3 and FSDP2 each rank writes until all are done, because each token needs the others' shards.

    Args:
        module: the LightningModule, for its device and strategy.
        model: the student: a transformers model, PEFT-wrapped or not.
        tokenizer: its tokenizer.
        ids: (B, P) prompts, padded on the left.
        mask: (B, P).
        sampling: how it writes.
        **further: arguments of ``generate`` that stand above those.
    """
    together = module.trainer.world_size > 1 and shards_the_student(module.trainer)
    arguments = {**sampling.arguments(), **further}
    config = copy.deepcopy(model.generation_config)
    config.update(**arguments)
    if not together and generates_row_by_row(config):
        arguments = {"custom_generate": decode_with(sampling.draws), **arguments}
    if sampling.vocabulary is not None:
        arguments = {**real_tokens(model, sampling.vocabulary), **arguments}
    write = functools.partial(model.generate, synced_gpus=together, use_cache=True, **arguments)
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        for unit in _units_around(module, model):
            write = functools.partial(through(unit, unit), write)
    return write(
        input_ids=ids.to(module.device),
        attention_mask=mask.to(module.device),
        pad_token_id=pad_token(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )


def _units_around(module: LightningModule, model: Any) -> list[nn.Module]:
    """Return the FSDP2 units around the student, the innermost first: `generate` runs past what they gather.

    PEFT's ``generate`` runs the model inside, and so does ours where a module's own wrapper is what FSDP2 cut.
    """
    student = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = [part for part in module.modules() if isinstance(part, FSDPModule) and part is not student]
    return [unit for unit in reversed(units) if any(part is student for part in unit.modules())]


def responses(
    module: LightningModule,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    repeats: int = 0,
) -> list[list[int]]:
    """Let ``model`` answer ``prompts``, up to and with the first end of sequence; call it inside :func:`writing`.

    Args:
        module: as in :func:`generated`.
        model: likewise.
        tokenizer: likewise.
        prompts: token ids of B prompts.
        sampling: how it writes.
        repeats: stop rows in which a sequence comes so many times in a row; 0 is off. The loop's tail is left on.
    """
    ids, mask = left_padded(prompts, pad_token(tokenizer))
    width = ids.shape[1]
    criteria = {"stopping_criteria": StoppingCriteriaList([StopLoops(width, repeats)])} if repeats else {}
    written = generated(module, model, tokenizer, ids, mask, sampling, **criteria)
    return [until_end(row, [tokenizer.eos_token_id]) for row in written[:, width:].tolist()]


def write(
    module: LightningModule, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> Rollouts:
    """Let ``model`` answer ``prompts``, as ``seed`` alone decides."""
    with writing(module, model, seed):
        answers = responses(module, model, tokenizer, prompts, sampling)
    return assembled(prompts, answers, pad_token(tokenizer), module.device)


def texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Decode the completions, without special tokens."""
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rollouts.responses()]
