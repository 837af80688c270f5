"""DistillKit's compressed log-probabilities (arcee-ai/DistillKit, ``distillkit/compression``; read at a61c2e7).

``sample_logits_vllm`` writes a directory of Parquet files and ``compression_config.yaml``. A row of L tokens has
L - 1 distributions, those that vLLM gives for the prompt's tokens from the second on: the one at index t is over
token t + 1. Its ``pack_logits`` puts several texts into a row, each without its last token, and numbers them in
``attention_mask``; they are taken apart again. At a position stand ``bytepacked_indices``, K token ids of
ceil(log2(d)) bits each, the highest bit first; and ``compressed_logprobs``, in falling order: ``exact_k`` values as
they are, the coefficients of a curve through the others, and bins of what the curve misses, a scale and
``num_elements`` integers each.

Read is what their own ``decompress_monotonic_logprobs`` gives, with one exception. The curve is a fit to
log-probabilities, and where a teacher is very sure it may give the others more than all probability, which DistillKit's
loss then scales to one. There the values that are stored as they are are kept, and all others counted to the tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.importing.teacher import StoredTargets
from kd_plugin.inputs import load_rows
from kd_plugin.settings import built

CONFIG = "compression_config.yaml"
_COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_ROUNDING = 0.01  # what rounding to bfloat16 may add to the mass of a list
_CURVES = {"sqrt": torch.sqrt, "exp": torch.exp}


@dataclass(frozen=True)
class Bin:
    """Some of the values that the curve missed, as integers times a scale."""

    scale_dtype: Literal["float16", "bfloat16", "float32", "float64"]
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Compression:
    """DistillKit's ``DistributionQuantizationConfig``, under its own names.

    Attributes:
        d: tokens of the vocabulary, by which a token id has its number of bits.
        k: tokens listed at a position.
        exact_k: how many of them are stored as they are.
        exact_dtype: in which type.
        polynomial_terms: the curve through the others: powers of the index, ``sqrt`` or ``exp``.
        term_dtype: of its coefficients.
        residual_bins: what the curve misses.
        delta_encoding: whether each value is the difference from the one before.
        error_diffusion: how values were rounded; reading does not depend on it.
        normalize_t: whether the index runs from 0 to 1.
    """

    d: int
    k: int
    exact_k: int
    residual_bins: tuple[Bin, ...] = ()
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        for name in ("exact_dtype", "term_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ConfigError(f"{name}: expected one of {', '.join(_DTYPES)}, got {getattr(self, name)!r}.")
        for term in self.polynomial_terms:
            if term not in _CURVES and not (isinstance(term, int) and term >= 0):
                raise ConfigError(f"polynomial_terms: expected powers, sqrt or exp, got {term!r}.")
        if not 0 <= self.exact_k <= self.k <= self.d:
            raise ConfigError(f"expected 0 <= exact_k <= k <= d, got {self.exact_k}, {self.k} and {self.d}.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Compression:
        """Read the values of ``compression_config.yaml``, or of the key ``logprob_compressor`` of a training file.

        Raises:
            ConfigError: they are those of the older form, which cannot be read, or of none.
        """
        if isinstance(values.get("teacher"), Mapping):
            values = values["teacher"]
        values = values.get("logprob_compressor", values.get("legacy_logit_compression", values))
        if "polynomial_degree" in values:
            raise ConfigError(
                "This is DistillKit's legacy compression. It stores logits less their mean, and not their normalizer, "
                "so that no probability can be had from them. Capture again, or take a dataset in the newer form."
            )
        given = dict(values)
        given["residual_bins"] = tuple(built(Bin, one) for one in given.get("residual_bins") or ())
        given["polynomial_terms"] = tuple(given.get("polynomial_terms") or ())
        return built(cls, given)

    @property
    def id_bits(self) -> int:
        """Bits of a token id, by DistillKit's own arithmetic, in float32."""
        return int(torch.log2(torch.tensor(self.d, dtype=torch.float32)).ceil())

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the ids and of the log-probabilities at a position."""
        values = self.exact_k * _DTYPES[self.exact_dtype].itemsize
        values += len(self.polynomial_terms) * _DTYPES[self.term_dtype].itemsize
        for one in self.residual_bins:
            values += _DTYPES[one.scale_dtype].itemsize + -(-one.num_elements * one.element_bits // 8)
        return -(-self.k * self.id_bits // 8), values

    def ids(self, packed: Tensor) -> Tensor:
        """Return the token ids (N, K) of packed bytes (N, M) uint8."""
        return _integers(packed, self.id_bits, self.k)

    def logprobs(self, packed: Tensor) -> Tensor:
        """Return log-probabilities (N, K) in nats of packed bytes (N, M) uint8, rounded where DistillKit rounds."""
        own = _DTYPES[self.exact_dtype]
        exact, rest = _floats(packed, self.exact_k, self.exact_dtype)
        curve: Tensor | float = 0.0
        if self.polynomial_terms:
            coefficients, rest = _floats(rest, len(self.polynomial_terms), self.term_dtype)
            curve = (self._terms() * coefficients.unsqueeze(1)).sum(-1)
        missed = torch.zeros(len(packed), self.k - self.exact_k)
        first = 0
        for one in self.residual_bins:
            scale, rest = _floats(rest, 1, one.scale_dtype)
            size = -(-one.num_elements * one.element_bits // 8)
            integers, rest = _integers(rest[:, :size], one.element_bits, one.num_elements), rest[:, size:]
            missed[:, first : first + one.num_elements] = _centred(integers, one.element_bits) * scale
            first += one.num_elements
        found = torch.cat([exact, curve + missed.to(own)], dim=1)
        return (found.float().cumsum(1).to(own) if self.delta_encoding else found).float()

    def _terms(self) -> Tensor:
        """Return the terms of the curve (K - exact_k, terms), in the type of the coefficients."""
        count, dtype = self.k - self.exact_k, _DTYPES[self.term_dtype]
        t = torch.linspace(0, 1, count, dtype=dtype) if self.normalize_t else torch.arange(count, dtype=dtype)
        return torch.stack(
            [_CURVES[term](t) if isinstance(term, str) else t**term for term in self.polynomial_terms], -1
        )


class DistillKitOutputs:
    """A dataset in DistillKit's form; see :class:`~kd_plugin.importing.teacher.StoredOutputs`.

    Args:
        reference: the directory that DistillKit wrote, a Parquet file, or a hub id.
        compression: its settings, where they do not lie beside the files.
        split: of a hub dataset.
        temperature: by which the teacher's logits were divided; DistillKit's own capture does not divide them.

    Raises:
        ConfigError: no settings of the compression, or those of a form that cannot be read.
        DataError: the rows are of another form.
    """

    def __init__(
        self, reference: str, compression: Mapping[str, Any] | None, split: str = "train", temperature: float = 1.0
    ) -> None:
        if compression is None:
            raise ConfigError(
                f"{reference} has no {CONFIG}. Name a file with the settings that it was compressed with: --compression"
                " FILE; DistillKit's training file has them under teacher: logprob_compressor."
            )
        self.compression = Compression.of(compression)
        self.listed, self.temperature = self.compression.k, temperature
        self.dataset = load_rows(reference, split=split)
        _require_columns(self.dataset.column_names)
        self._ids = self.dataset.select_columns(["input_ids"])  # the distributions are a hundred times as large
        self._texts = list(self._found_texts())
        self.identity: Mapping[str, Any] = {
            "format": "distillkit",
            "rows": len(self._texts),
            "first": hashlib.sha256(json.dumps(self._ids[0]["input_ids"]).encode()).hexdigest(),
            "compression": repr(self.compression),
        }

    def _found_texts(self) -> Iterator[tuple[int, int, int]]:
        """Yield each text as its row, its first token there, and the one after its last.

        Packed rows number their texts in ``attention_mask``, from 1 on; 0 is padding.
        """
        if "attention_mask" not in self.dataset.column_names:
            yield from ((row, 0, -1) for row in range(len(self.dataset)))
            return
        for row, mask in enumerate(self.dataset["attention_mask"]):
            numbers = np.asarray(mask)
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for start, end in pairwise(edges):
                if numbers[start] and end - start > 1:
                    yield row, start, end

    def __len__(self) -> int:
        return len(self._texts)

    def tokens(self, row: int) -> Sequence[int]:
        """Return a text's token ids."""
        at, start, end = self._texts[row]
        ids = self._ids[at]["input_ids"]
        return list(ids[start : len(ids) if end < 0 else end])

    def scored(self, row: int) -> range:
        """Return all positions that have a next token."""
        return range(len(self.tokens(row)) - 1)

    def row(self, row: int) -> StoredTargets:
        """Return the distributions of a text.

        Raises:
            DataError: which token each is for cannot be known, or they have not as many bytes as the settings say.
        """
        at, start, end = self._texts[row]
        found = self.dataset[at]
        tokens = len(found["input_ids"])
        read = []
        for name, count in zip(_COLUMNS[1:], reversed(self.compression.bytes), strict=True):
            lists = found[name]
            # Packing drops the last token of each text, of which vLLM gave no distribution over what follows
            if len(lists) != (tokens - 1 if end < 0 else tokens) and (end < 0 or len(lists) != tokens - 1):
                raise DataError(
                    f"Row {at} has {len(lists)} {name} for {tokens} tokens; expected {tokens - 1}, one for each token "
                    "after the first, or in packed rows, which have attention_mask, as many as tokens. Which token "
                    "each is for cannot be known."
                )
            lists = lists[start : tokens - 1 if end < 0 else end - 1]
            wrong = next((place for place, one in enumerate(lists) if len(one) != count), None)
            if wrong is not None:
                raise DataError(
                    f"Row {at}, position {start + wrong}: {name} has {len(lists[wrong])} bytes; by the settings of the "
                    f"compression it has {count}. They are not those of the capture."
                )
            read.append(torch.from_numpy(np.asarray(lists, np.uint8).reshape(-1, count)))
        values, ids = read
        logprobs = self.compression.logprobs(values)
        beyond = logprobs.double().exp().sum(1) > 1 + _ROUNDING
        logprobs[beyond, self.compression.exact_k :] = -torch.inf
        return StoredTargets(self.compression.ids(ids).numpy(), logprobs.numpy())


def _require_columns(columns: Sequence[str]) -> None:
    if {"packed_indices", "exact_values", "coeffs"} <= set(columns):
        raise DataError(
            "These are rows of DistillKit's legacy form: logits less their mean, without their normalizer, so that no "
            "probability can be had from them. Capture again, or take a dataset in the newer form."
        )
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DataError(f"The rows have no {' and no '.join(missing)}; DistillKit's have {', '.join(_COLUMNS)}.")


def _floats(packed: Tensor, count: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Take ``count`` numbers of a type from the front of bytes (N, M); return them (N, count) and the rest."""
    size = count * _DTYPES[dtype].itemsize
    return packed[:, :size].clone().flatten().view(_DTYPES[dtype]).reshape(len(packed), count), packed[:, size:]


def _integers(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` integers of some bits each, the highest first, from bytes (N, M)."""
    places = torch.arange(7, -1, -1)
    stream = ((packed.unsqueeze(-1) >> places) & 1).flatten(1)[:, : count * bits].reshape(len(packed), count, bits)
    return (stream.long() << torch.arange(bits - 1, -1, -1)).sum(-1)


def _centred(integers: Tensor, bits: int) -> Tensor:
    """Return what stored integers stand for, in units of their scale."""
    return integers.float() * 2.0 - 1.0 if bits == 1 else integers.float() - 2.0 ** (bits - 1)
