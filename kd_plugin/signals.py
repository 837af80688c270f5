"""What a teacher emits and a divergence consumes.

Shape suffixes: N scored positions, K stored tokens, V vocabulary, H hidden width. A *scored position* is a
position whose next token is trained on; the distribution at position t is the one over token t+1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.errors import ConfigError
from kd_plugin.vocab import SharedTokens


@dataclass(frozen=True)
class OutputHead:
    """What turns a last hidden state into next-token logits.

    ``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``; without a soft-cap the tanh is
    left out. Rows of ``weight`` beyond ``vocab_size`` are padding that no tokenizer can produce; they are
    cut before the softmax.

    Attributes:
        weight: (rows, H) output projection. Of a sharded model it is a part until
            :func:`~kd_plugin.sharding.gathered_heads` makes an ordinary tensor of it.
        bias: (rows,) or None.
        vocab_size: number of rows that are real tokens; rows beyond are ignored.
        logit_scale: multiplier of the logits (Cohere, Granite, Falcon-H1).
        softcap: final soft-cap (Gemma), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    vocab_size: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_model(cls, model: nn.Module, vocab_size: int | None = None) -> OutputHead:
        """Read the head of a transformers causal language model, PEFT-wrapped or not.

        Args:
            model: the model; its ``get_output_embeddings()`` and ``config`` are read.
            vocab_size: number of real tokens; the rows beyond are padding.

        Raises:
            ConfigError: the model has no output embeddings, or an adapter on them.
        """
        module = model.get_output_embeddings()  # type: ignore[operator]
        if module is None:
            raise ConfigError(f"{type(model).__name__} has no output head; a causal language model is needed.")
        refuse_adapted_head(module)
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        head = cls(
            weight=module.weight,
            bias=getattr(module, "bias", None),
            logit_scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )
        return head if vocab_size is None else replace(head, vocab_size=vocab_size)

    def real_rows(self) -> OutputHead:
        """Return this head cut to ``vocab_size`` rows, without copying them.

        Raises:
            ConfigError: the head has fewer rows, or is sharded: gathering is a collective call, which is never made
                here, where only some ranks may come by.
        """
        weight, bias, rows = self.weight, self.bias, self.vocab_size
        if weight.dim() != 2 or hasattr(weight, "full_tensor"):
            raise ConfigError(
                "The output head is sharded: this rank holds a part of it. Open it first, on all ranks together: "
                "with kd_plugin.sharding.gathered_heads([head]) as (head,): ..."
            )
        if rows is not None and rows > weight.shape[0]:
            raise ConfigError(
                f"The output head has {weight.shape[0]} rows, but the vocabulary has {rows} tokens. "
                "Resize the model's embeddings to its tokenizer."
            )
        if rows is None or rows == weight.shape[0]:
            return self
        return replace(self, weight=weight[:rows], bias=None if bias is None else bias[:rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """Project ``hidden`` (..., H) to logits (..., V) in full: the readable form, for tests and small N."""
        head = self.real_rows()
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, head.weight.to(hidden.dtype), bias)
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def shaped(self, products: Tensor, ids: Tensor | None = None) -> Tensor:
        """Turn products of hidden states and rows of the weight into logits, in place and without a gradient.

        Args:
            products: (N, rows), or (N, K) for the tokens ``ids``.
            ids: (N, K) tokens that the columns stand for; None for all, in order.
        """
        if self.bias is not None:
            products += self.bias.detach() if ids is None else self.bias.detach()[ids]
        if self.logit_scale != 1.0:
            products *= self.logit_scale
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class HiddenSignal:
    """An in-process teacher's full distribution, kept as hidden states until the loss projects them.

    Attributes:
        hidden: (N, H) last hidden states at the scored positions; no gradient.
        head: the teacher's output head.
        shared: where the teacher has another vocabulary than the student, what they share; the head is over all of the
            teacher's tokens then. None for the same tokens.
    """

    hidden: Tensor
    head: OutputHead
    shared: SharedTokens | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def within(self, vocab_size: int) -> HiddenSignal:
        """Return the distribution over the first ``vocab_size`` tokens."""
        if self.head.vocab_size == vocab_size:
            return self
        return HiddenSignal(self.hidden, replace(self.head, vocab_size=vocab_size))

    def over(self, shared: SharedTokens) -> HiddenSignal:
        """Return the same distribution, to be compared over the tokens that the student shares."""
        return replace(self, head=replace(self.head, vocab_size=shared.teacher_size), shared=shared)


@dataclass(frozen=True)
class SparseSignal:
    """Some tokens of a teacher's distribution, from a cache or a server.

    Entries beyond a position's count are padding: ``logprobs`` is ``-inf`` and ``draws`` is 0 there.

    Attributes:
        ids: (N, K) int64 token ids.
        logprobs: (N, K) nats under the teacher's full softmax.
        tail_logmass: (N,) log of the probability not listed; ``-inf`` when everything is listed.
        draws: (N, K) how often each token was drawn, for sampled targets; None for top-k.
        sampled_token_logprobs: (N,) nats of the sampled token, which stands at the next position, listed or not, where
            the teacher tells; None where it does not.
        shared: where the teacher has another vocabulary than the student, what they share: only shared tokens are
            listed, and the mass not listed holds all others of the teacher. None for the same tokens.
        rest_mass: (N,) probability of tokens that the teacher listed and the student does not share; with ``shared``.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logmass: Tensor
    draws: Tensor | None = None
    sampled_token_logprobs: Tensor | None = None
    shared: SharedTokens | None = None
    rest_mass: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> SparseSignal:
        """Move every tensor to ``device``, without waiting."""
        return self._with(*(None if t is None else t.to(device, non_blocking=True) for t in self._tensors()))

    def select(self, positions: Tensor) -> SparseSignal:
        """Return some positions, by number."""
        return self._with(*(None if t is None else t.index_select(0, positions) for t in self._tensors()))

    def within(self, vocab_size: int) -> SparseSignal:
        """Return the distribution over the first ``vocab_size`` tokens: listed ones beyond go, the rest is scaled up.

        Of sampled targets the draws of those tokens go; a position that loses all its draws has none left.
        """
        gone = (self.ids >= vocab_size) & (self.logprobs != -math.inf)
        if self.draws is None:
            lost = torch.where(gone, self.logprobs.exp(), 0.0).sum(-1)
        else:
            lost = torch.where(gone, self.draws, 0).sum(-1) / self.draws.sum(-1).clamp(min=1)
        scale = torch.log1p(-lost.clamp(max=1.0 - 1e-6)).to(self.logprobs.dtype)
        return SparseSignal(
            self.ids.masked_fill(gone, 0),
            (self.logprobs - scale.unsqueeze(-1)).masked_fill(gone, -math.inf),
            self.tail_logmass - scale,
            None if self.draws is None else self.draws.masked_fill(gone, 0),
            None if self.sampled_token_logprobs is None else self.sampled_token_logprobs - scale,
        )

    def over(self, shared: SharedTokens) -> SparseSignal:
        """Return the distribution with tokens listed that the student shares; all others join what is not listed.

        Sampled targets have nothing for what is not listed: the draws of other tokens go, and a position that loses
        all has none left.
        """
        gone = (self.logprobs != -math.inf) & ~shared_mask(shared, self.ids)
        logprobs, tail = self.logprobs, self.tail_logmass
        mass = logprobs.masked_fill(~gone, -math.inf).exp().sum(-1)
        if self.draws is None:
            tail = torch.logaddexp(tail, mass.log())
        else:
            mass = torch.where(gone, self.draws, 0).sum(-1) / self.draws.sum(-1).clamp(min=1)
            logprobs = logprobs - torch.log1p(-mass.clamp(max=1.0 - 1e-6)).to(logprobs.dtype).unsqueeze(-1)
        return replace(
            self,
            ids=self.ids.masked_fill(gone, 0),
            logprobs=logprobs.masked_fill(gone, -math.inf),
            tail_logmass=tail,
            draws=None if self.draws is None else self.draws.masked_fill(gone, 0),
            shared=shared,
            rest_mass=mass,
        )

    def split(self, counts: Sequence[int]) -> list[SparseSignal]:
        """Cut the positions into pieces of the given lengths."""
        pieces = [None if t is None else t.split(list(counts)) for t in self._tensors()]
        return [self._with(*(None if p is None else p[i] for p in pieces)) for i in range(len(counts))]

    @classmethod
    def joined(cls, signals: Sequence[SparseSignal]) -> SparseSignal:
        """Put positions of one teacher after one another, padding to the longest list; what one lacks, all lack."""
        width = max(signal.ids.shape[1] for signal in signals)

        def padded(tensor: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

        def column(tensors: Sequence[Tensor | None], fill: float | None = None) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            if len(present) < len(tensors):
                return None
            return torch.cat(present if fill is None else [padded(tensor, fill) for tensor in present])

        return signals[0]._with(
            column([signal.ids for signal in signals], 0),
            column([signal.logprobs for signal in signals], -math.inf),
            column([signal.tail_logmass for signal in signals]),
            column([signal.draws for signal in signals], 0),
            column([signal.sampled_token_logprobs for signal in signals]),
            column([signal.rest_mass for signal in signals]),
        )

    def _with(self, *tensors: Tensor | None) -> SparseSignal:
        """Return a signal of the same teacher with these in the place of :meth:`_tensors`."""
        ids, logprobs, tail, draws, sampled, mass = tensors
        assert ids is not None and logprobs is not None and tail is not None
        return SparseSignal(ids, logprobs, tail, draws, sampled, self.shared, mass)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.logprobs, self.tail_logmass, self.draws, self.sampled_token_logprobs, self.rest_mass


@dataclass(frozen=True)
class TextSignal:
    """A correction that a teacher wrote, as the student's own tokens: all mass is on the token that should come next.

    Attributes:
        tokens: (N,) int64 the correction's tokens at the scored positions.
        weights: (N,) how much each counts: 1 from where the correction departs from the response.
    """

    tokens: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def as_list(self) -> SparseSignal:
        """Return the distribution as a list of one token; the forward KL from it is the cross-entropy."""
        certain = torch.zeros(len(self), 1, device=self.tokens.device)
        return SparseSignal(self.tokens.unsqueeze(-1), certain, torch.full_like(certain[:, 0], -math.inf))


def shared_mask(shared: SharedTokens, ids: Tensor) -> Tensor:
    """Return which of some ids, of any shape, are shared."""
    return _shared_table(shared, ids.device)[ids.clamp(max=max(shared.student_size, shared.teacher_size))]


@lru_cache(maxsize=64)
def _shared_table(shared: SharedTokens, device: torch.device) -> Tensor:
    table = torch.zeros(max(shared.student_size, shared.teacher_size) + 1, dtype=torch.bool)
    table[torch.tensor(shared.ids())] = True
    return table.to(device)


def refuse_adapted_head(head: nn.Module) -> None:
    """Refuse an output head that an adapter changes: a loss reads the head's own weight alone.

    Raises:
        ConfigError: says which layer of PEFT it is, and what trains a head beside an adapter.
    """
    kinds = [kind for kind in type(head).__mro__ if kind.__module__.startswith("peft.")]
    if kinds and not any(kind.__name__ == "ModulesToSaveWrapper" for kind in kinds):
        raise ConfigError(
            f"An adapter changes the output head (lm_head is a {kinds[0].__module__}.{kinds[0].__name__}), and the "
            "loss reads the head's own weight, so that the adapter would be neither used nor trained. Take the head "
            "out of target_modules and trainable_token_indices, or train it as a whole (modules_to_save)."
        )


def _logit_scale(config: Any) -> float:
    """Return the multiplier that a model applies to its logits, under the name its family gives it.

    The names and their meaning were read in transformers 5.23: Cohere ``logit_scale``, ``output_multiplier``,
    Falcon-H1 ``lm_head_multiplier``; Granite and MiniCPM3 divide by ``logits_scaling``, HyperCLOVA X
    multiplies by it.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
