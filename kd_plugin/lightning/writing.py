"""Letting the student write, on any strategy, the same on a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor

from kd_plugin.panel.rollouts import left_padded


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
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

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
        lengths: tokens of each completion, its end-of-sequence token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_start: int
    lengths: tuple[int, ...]

    def labels(self) -> Tensor:
        """Return (B, P + C) the completions' tokens, -100 elsewhere."""
        labels = self.input_ids.masked_fill(self.attention_mask == 0, -100)
        labels[:, : self.completion_start] = -100
        return labels

    def select(self, rows: slice) -> Rollouts:
        """Return some of the rows, cut to their own longest completion."""
        lengths = self.lengths[rows]
        width = self.completion_start + max(lengths, default=0)
        return Rollouts(self.input_ids[rows, :width], self.attention_mask[rows, :width], self.completion_start, lengths)


def render(tokenizer: Any, prompts: Sequence[Any], max_length: int | None = None) -> list[list[int]]:
    """Tokenize prompts, text or messages, as TRL does; a longer one keeps its end."""
    rendered = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer(text=prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=True)
            ids = ids["input_ids"]
        rendered.append(list(ids[-max_length:] if max_length else ids))
    return rendered


@torch.no_grad()
def write(
    module: LightningModule, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> Rollouts:
    """Let ``model`` answer ``prompts``.

    The random state outside is left alone, and inside it depends on ``seed`` alone, so that a resumed run writes what
    an undisturbed one writes. Under ZeRO-3 and FSDP2 each rank writes until all are done, because each token needs
    the others' shards.

    Args:
        module: the LightningModule, for its device and strategy.
        model: the student: a transformers model, PEFT-wrapped or not.
        tokenizer: its tokenizer.
        prompts: token ids of B prompts.
        sampling: how it writes.
        seed: of this call; another one for each step and rank.
    """
    device = module.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = (tensor.to(device) for tensor in left_padded(prompts, pad))
    width = ids.shape[1]
    was_training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=_sharded(module),
            use_cache=True,
            **sampling.arguments(),
        )
    model.train(was_training)
    completions = written[:, width:]
    ended = completions == tokenizer.eos_token_id
    # Tokens up to and with the first end; all of them where there is none
    kept = (ended.int().cumsum(1) - ended.int()) == 0
    attention = torch.cat([mask, kept.to(mask.dtype)], dim=1)
    lengths = kept.sum(1).tolist()  # the host needs them once a generation batch
    whole = Rollouts(torch.where(attention == 1, written, pad), attention, width, tuple(lengths))
    return whole.select(slice(None))


def texts(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Decode the completions, without special tokens."""
    rows = rollouts.input_ids[:, rollouts.completion_start :].tolist()
    return [
        tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(rows, rollouts.lengths, strict=True)
    ]


def _sharded(module: LightningModule) -> bool:
    strategy = module.trainer.strategy
    if module.trainer.world_size == 1:
        return False
    zero3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero3 or isinstance(strategy, ModelParallelStrategy)
