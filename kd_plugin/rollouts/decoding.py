"""A decoding loop for ``transformers``' ``generate`` that does not pay for what the result does not need.

``model.generate(..., custom_generate=decode)`` prepares everything as always, and calls this in the place of its own
sampling loop. The tokens are the same; what falls away, where it applies:

- Rows that ended. ``transformers`` computes them until the longest row ends, and gives padding; here they leave the
  batch, and their keys and values the cache.
- A copy of all keys and values for each token. The cache grows in blocks.
- On a CPU, half the time of a product of few rows with many: see :func:`few_rows`. It rounds otherwise, as a product
  of another number of rows does.
- With ``draws="uniform"``, a random number for each token of the vocabulary: one a row is enough to draw from a
  cumulative distribution. The distribution is the same, the tokens of a given seed are others.

Shape suffixes: B rows of the call, R rows that are still going, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode, logits_process, stopping_criteria

from kd_plugin.models import output_rows
from kd_plugin.upstream import CACHE, decoding, is_compiled, next_inputs, pad_token, sampling_loop
from kd_plugin.vocab import Vocabulary

Draws = Literal["multinomial", "uniform"]

_GROWTH = 128  # columns that a cache gains at once
_LEAST_SHARE = 8  # the batch is made smaller when one row in so many has ended: moving the cache costs about a token
_FEW_ROWS = 8  # up to so many, a product on a CPU is faster the other way around
_ROW_BY_ROW = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.EosTokenCriteria,
)
_KNOWN_INPUTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}


class RealTokens(LogitsProcessor):
    """Leaves the first ``size`` tokens: rows of a head beyond are padding, or tokens that a teacher has no row for."""

    row_by_row = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:  # noqa: D102
        scores[:, self.size :] = -torch.inf
        return scores  # type: ignore[no-any-return]


def real_tokens(model: Any, vocabulary: Vocabulary) -> dict[str, LogitsProcessorList]:
    """Return the argument of ``generate`` that keeps a student, whose head may have more rows, to a vocabulary."""
    rows = output_rows(model)
    if rows is None or rows <= vocabulary.size:
        return {}
    return {"logits_processor": LogitsProcessorList([RealTokens(vocabulary.size)])}


def generates_row_by_row(config: GenerationConfig) -> bool:
    """Whether ``generate`` would sample or take the likeliest token, so that :func:`decode` may stand in for it."""
    return config.get_generation_mode() in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)


def decode_with(draws: str = "multinomial") -> Callable[..., Tensor]:
    """Return :func:`decode` with other draws, for ``generate(custom_generate=...)``."""
    return partial(decode, draws=draws)


@torch.no_grad()
def decode(
    model: GenerationMixin,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draws: str = "multinomial",
    **model_kwargs: Any,
) -> Tensor:
    """Write each row until it ends; called by ``generate``, in a process that need not wait for others.

    Where it does not apply (another cache than the plain growing one, encoder and decoder, images, a processor or
    criterion that looks at other rows) the model's own sampling loop runs. Ask :func:`generates_row_by_row` first:
    beams and the like are another loop's.

    Args:
        model: the model.
        input_ids: (B, L) prompts, padded on the left.
        logits_processor: as ``generate`` made them.
        stopping_criteria: as ``generate`` made them; one of the user's own is taken to look at its row alone if it
            says ``row_by_row = True``.
        generation_config: as ``generate`` completed it.
        draws: ``multinomial`` draws the tokens that ``torch.multinomial`` draws from the same generator, whatever
            rows have ended. ``uniform`` draws from the same distribution, with one random number a row.
        model_kwargs: the other inputs of the model.

    Returns:
        (B, L + longest) prompts and what was generated, padded on the right.
    """
    config = generation_config
    if not _applies(model, logits_processor, stopping_criteria, config, model_kwargs):
        return sampling_loop(model, input_ids, logits_processor, stopping_criteria, config, **model_kwargs)
    rows, device = input_ids.shape[0], input_ids.device
    padding = pad_token(config)
    pad = 0 if padding is None else padding.to(device)
    model_kwargs[CACHE].layers = [GrowingLayer() for _ in model_kwargs[CACHE].layers]
    ended: list[tuple[Tensor, Tensor]] = []  # which rows, and their tokens
    here_R = torch.arange(rows, device=device)
    going_R = torch.ones(rows, dtype=torch.bool, device=device)
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    with decoding(model), few_rows(model):
        while True:
            outputs = model(**inputs, return_dict=True)
            model_kwargs = next_inputs(model, outputs, model_kwargs)
            # A copy only where more hangs on it: the logits of a prompt
            last_RV = outputs.logits[:, -1].to(torch.float32, copy=outputs.logits.shape[1] > 1)
            del outputs
            scores_RV = logits_processor(input_ids, last_RV)
            tokens_R = _choose(scores_RV, here_R, rows, draws if config.do_sample else None)
            input_ids = torch.cat([input_ids, torch.where(going_R, tokens_R, pad).unsqueeze(1)], dim=1)
            going_R = going_R & ~stopping_criteria(input_ids, None)
            left = int(going_R.sum())  # the host waits once a token, as in transformers
            if left == 0:
                break
            if (len(here_R) - left) * _LEAST_SHARE >= len(here_R):
                ended.append((here_R[~going_R], input_ids[~going_R]))
                kept = going_R.nonzero().squeeze(1)
                here_R, going_R, input_ids = here_R[kept], going_R[kept], input_ids[kept]
                model_kwargs = _rows_of(model_kwargs, kept)
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
    ended.append((here_R, input_ids))
    whole = input_ids.new_full((rows, input_ids.shape[1]), 0) + pad
    for where, tokens in ended:
        whole[where, : tokens.shape[1]] = tokens
    return whole


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Have a model's linear layers on a CPU, in float32, multiply few rows the other way around inside the block.

    For x of (R, in) and a weight of (out, in) the product is formed as (W·xᵀ)ᵀ. With few rows and ``out`` no smaller
    than ``in`` the library then reads the weights once, where it packs them first otherwise: measured with MKL on
    AVX-512, see docs/results.md. Other layers, and more rows, are left as they are; so is a model of which a part is
    compiled, since the compiler would begin anew with each response.
    """
    modules = list(model.modules())
    layers = [
        layer
        for layer in modules
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter  # no quantized one, and none that FSDP2 shards
        and "forward" not in vars(layer)
        and layer.out_features >= layer.in_features
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkl.is_available() or any(map(is_compiled, modules)):
        layers = []
    for layer in layers:
        layer.forward = partial(_product, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(layer: nn.Linear, input: Tensor) -> Tensor:
    *shape, width = input.shape
    if input.numel() > _FEW_ROWS * width:
        return nn.functional.linear(input, layer.weight, layer.bias)
    found = torch.mm(layer.weight, input.reshape(-1, width).t()).t().contiguous()
    if layer.bias is not None:
        found += layer.bias
    return found.view(*shape, layer.out_features)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, in tensors that are longer than what they hold, so that few tokens copy them."""

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add (R, heads, new, width) keys and values; return all that are held."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < stop:
            held = (None, None) if self._room is None else tuple(room[..., :start, :] for room in self._room)
            self._room = (
                _longer(key_states, held[0], stop + _GROWTH),
                _longer(value_states, held[1], stop + _GROWTH),
            )
        keys, values = self._room
        keys.narrow(-2, start, stop - start).copy_(key_states)
        values.narrow(-2, start, stop - start).copy_(value_states)
        self.keys, self.values = keys.narrow(-2, 0, stop), values.narrow(-2, 0, stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self._room is not None:
            length = self.get_seq_length()
            self._room = (self._room[0].index_select(0, indices), self._room[1].index_select(0, indices))
            self.keys, self.values = (room[..., :length, :] for room in self._room)


def _longer(new: Tensor, held: Tensor | None, length: int) -> Tensor:
    room = new.new_empty((*new.shape[:-2], length, new.shape[-1]))
    if held is not None:
        room[..., : held.shape[-2], :] = held
    return room


def _choose(scores_RV: Tensor, here_R: Tensor, rows: int, draws: str | None) -> Tensor:
    """Choose a token for each row that is still going; ``rows`` is how many there were at first."""
    if draws is None:
        return scores_RV.argmax(-1)
    probs_RV = scores_RV.softmax(-1)
    if draws == "uniform":
        return draw_uniform(probs_RV, torch.rand(rows, dtype=_exact(probs_RV), device=probs_RV.device)[here_R])
    if len(here_R) == rows:
        return torch.multinomial(probs_RV, 1).squeeze(1)
    # What torch.multinomial does with one draw; rows that ended take their part of the generator's numbers
    noise_BV = probs_RV.new_empty(rows, probs_RV.shape[1]).exponential_()
    return (probs_RV / noise_BV[here_R]).argmax(-1)


def draw_uniform(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Draw (R,) tokens where the cumulative distribution passes ``uniform_R``, in [0, 1)."""
    total_RV = probs_RV.cumsum(-1, dtype=_exact(probs_RV))
    passed_R1 = uniform_R.to(total_RV.dtype).unsqueeze(-1) * total_RV[:, -1:]
    found_R = torch.searchsorted(total_RV, passed_R1, right=True).squeeze(-1)
    return found_R.clamp_(max=probs_RV.shape[1] - 1)


def _exact(probs_RV: Tensor) -> torch.dtype:
    return torch.float32 if probs_RV.device.type == "mps" else torch.float64  # MPS knows no float64


def _rows_of(model_kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    chosen = dict(model_kwargs)
    for name in ("attention_mask", "position_ids"):
        if chosen.get(name) is not None:
            chosen[name] = chosen[name].index_select(0, kept)
    chosen[CACHE].batch_select_indices(kept)
    return chosen


def _applies(
    model: Any,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> bool:
    cache, positions = model_kwargs.get(CACHE), model_kwargs.get("position_ids")
    return (
        not model.config.is_encoder_decoder
        and not config.return_dict_in_generate
        and config.prefill_chunk_size is None
        and bool(model_kwargs.get("use_cache"))
        and isinstance(cache, DynamicCache)
        and type(cache) is DynamicCache
        and not cache.offloading
        and bool(cache.layers)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and (positions is None or positions.dim() == 2)
        and {name for name, value in model_kwargs.items() if value is not None} <= _KNOWN_INPUTS
        and all(isinstance(p, _ROW_BY_ROW) or getattr(p, "row_by_row", False) for p in [*processors, *criteria])
    )
