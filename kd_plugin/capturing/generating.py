"""Letting a teacher in this process generate completions.

A completion depends on the seed, the row's number, its prompt and the completion's own number, never on the worker.
Sampling is the inverse of the cumulative distribution at numbers drawn from those (:func:`uniforms`), inside
transformers' own ``generate``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_plugin.cache.manifest import Settings
from kd_plugin.cache.schema import Example, Extracted, example_id
from kd_plugin.cache.targets import Generation
from kd_plugin.errors import ConfigError, NonFiniteError
from kd_plugin.sharding import called
from kd_plugin.teachers.base import end_tokens
from kd_plugin.teachers.in_process import InProcessTeacher

if TYPE_CHECKING:
    from kd_plugin.capturing.engines import Engine


def uniforms(seed: int, example_id: str, positions: int, draws: int) -> NDArray[np.float64]:
    """Return uniforms in [0, 1), shape (positions, draws), for the scored positions of an example in order.

    Counter-based (Philox 4x64, keyed by the SHA-256 of seed and example). Raw words are scaled here, since NumPy
    promises the stream of a bit generator for ever, and that of ``Generator.random`` not.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}/{example_id}".encode()).digest()[:16], dtype="<u8")
    words = np.random.Philox(key=key.astype(np.uint64)).random_raw(positions * draws)
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(positions, draws)


@dataclass(frozen=True)
class Request:
    """One completion to generate.

    Attributes:
        prompt: (P,) int32 token ids.
        key: what its random numbers depend on, beside the seed.
        max_new_tokens: tokens that fit.
    """

    prompt: NDArray[np.int32]
    key: str
    max_new_tokens: int

    @classmethod
    def of(cls, prompt: NDArray[np.int32], row: int, number: int, max_new_tokens: int) -> Request:
        """Return the request for completion ``number`` of dataset row ``row``."""
        return cls(prompt, f"{row}/{number}/{example_id(prompt)}", max_new_tokens)


@dataclass(frozen=True)
class Completion:
    """What the teacher generated.

    Attributes:
        ids: (C,) int32, its end token included.
        finished: whether it ended by itself.
        targets: the distribution at its C tokens where the engine gave it in the same pass, else None.
    """

    ids: NDArray[np.int32]
    finished: bool
    targets: Extracted | None = None


@dataclass(frozen=True)
class Generator:
    """A model in this process that generates.

    Attributes:
        model: a transformers model, PEFT-wrapped or not, in evaluation mode.
        ends: ids at which a completion ends, at least one.
        size: tokens of the vocabulary; rows of the head beyond it are padding.
        device: where it computes.
        run: runs a function inside what gathers the model's weights: ``run(function, *args, **kwargs)``.
        together: whether every rank goes on until all are done, because each token needs the others' shards.
    """

    model: Any
    ends: tuple[int, ...]
    size: int
    device: torch.device
    run: Callable[..., Any] = called
    together: bool = False


def generate_locally(
    teacher: InProcessTeacher, requests: Sequence[Request], generation: Generation, seed: int
) -> list[Completion]:
    """Generate one batch of completions with a teacher in this process; see :func:`generate_with`.

    Raises:
        ConfigError: the teacher's generation settings and tokenizer name no end token.
        NonFiniteError: the teacher's logits are not finite.
    """
    ends = tuple(sorted(end_tokens(teacher)))
    if not ends:
        raise ConfigError(f"Teacher {teacher.name!r} has no end token, so its completions never end. Set eos_token.")
    generator = Generator(teacher.model, ends, teacher.vocabulary.size, teacher.head.weight.device)
    return generate_with(generator, requests, generation, seed)


@torch.no_grad()
def generate_with(
    generator: Generator, requests: Sequence[Request], generation: Generation, seed: int
) -> list[Completion]:
    """Generate one batch of completions; torch's own random numbers are neither used nor changed.

    Args:
        generator: the model.
        requests: the batch; all are generated at once.
        generation: how.
        seed: of the random numbers.

    Raises:
        NonFiniteError: the model's logits are not finite.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ends, device = generator.ends, generator.device
    width = max(len(request.prompt) for request in requests)
    ids = np.full((len(requests), width), ends[0], np.int64)
    attention = np.zeros((len(requests), width), np.int64)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = request.prompt
        attention[row, width - len(request.prompt) :] = 1
    longest = max(request.max_new_tokens for request in requests)
    # Explicit, so that nothing of the checkpoint's own generation settings is mixed in.
    settings = GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    choose = _Choose(generation, generator.size, width, _numbers(requests, generation, seed, longest), device)
    generated = generator.run(
        generator.model.generate,
        input_ids=torch.from_numpy(ids).to(device),
        synced_gpus=generator.together,
        attention_mask=torch.from_numpy(attention).to(device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([choose]),
    )
    choose.require_finite()
    tokens = generated[:, width:].cpu().numpy().astype(np.int32)
    return [_cut(tokens[row], ends, request.max_new_tokens) for row, request in enumerate(requests)]


def _numbers(
    requests: Sequence[Request], generation: Generation, seed: int, longest: int
) -> NDArray[np.float64] | None:
    if generation.temperature == 0:
        return None
    return np.concatenate([uniforms(seed, f"write/{r.key}", longest, 1).T for r in requests])


def _cut(tokens: NDArray[np.int32], ends: Sequence[int], most: int) -> Completion:
    at = np.flatnonzero(np.isin(tokens[:most], ends))
    return Completion(tokens[: at[0] + 1], True) if at.size else Completion(tokens[:most], False)


class _Choose:
    """A logits processor that decides the next token itself, and leaves ``generate`` no other.

    Args:
        generation: how.
        vocab_size: rows of the head beyond it are padding.
        width: columns of the prompts.
        numbers: (B, steps) uniforms in [0, 1), or None for the likeliest token.
        device: where the model runs.
    """

    def __init__(
        self,
        generation: Generation,
        vocab_size: int,
        width: int,
        numbers: NDArray[np.float64] | None,
        device: torch.device,
    ) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._vocab_size, self._width = vocab_size, width
        self._numbers = None if numbers is None else torch.from_numpy(numbers).to(device)
        self._warpers: list[Any] = []
        if numbers is not None:
            if generation.temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(float(generation.temperature)))
            if generation.top_k:
                self._warpers.append(TopKLogitsWarper(generation.top_k))
            if generation.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(generation.top_p))
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()[:, : self._vocab_size]
        self._finite &= torch.isfinite(logits.logsumexp(-1)).all()
        if self._numbers is None:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            for warper in self._warpers:
                logits = warper(input_ids, logits)
            # Float64, since a float32 cumulative sum over 10^5 tokens would lose the tail.
            cumulative = logits.double().softmax(-1).cumsum(-1)
            step = input_ids.shape[1] - self._width
            point = self._numbers[:, step : step + 1] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, point, right=True).clamp_(max=self._vocab_size - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def require_finite(self) -> None:
        """Refuse what was generated from logits that are NaN or infinite; waits for the device once."""
        if not bool(self._finite):
            raise NonFiniteError(
                "The model's logits are NaN or infinite while it generates. Nothing of this unit was stored. Check "
                "its weights, or run it in bfloat16 or float32 rather than float16."
            )


class StudentWrites:
    """A student that generates, and the teacher that scores its responses: rollouts of one policy, scored once.

    Args:
        scoring: asks the teacher.
        writer: the student.
        digest: of its weights.
    """

    def __init__(self, scoring: Engine, writer: InProcessTeacher, digest: str) -> None:
        self._scoring, self._writer = scoring, writer
        self.weights, self.dtype = scoring.weights, scoring.dtype
        self.written_by: str | None = digest

    def describe(self) -> dict[str, str]:
        """Return what the manifest records of the teacher."""
        return self._scoring.describe()

    def require_same(self, recorded: Mapping[str, str]) -> None:
        """Refuse to go on with what another teacher began."""
        self._scoring.require_same(recorded)

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group as the teacher's engine does."""
        return self._scoring.batches(lengths)

    def score(self, examples: Sequence[Example], settings: Settings) -> list[Extracted]:
        """Return each example's targets, by the teacher."""
        return self._scoring.score(examples, settings)

    def generate(self, requests: Sequence[Request], settings: Settings) -> list[Completion]:
        """Let the student write one batch."""
        assert settings.generation is not None
        return generate_locally(self._writer, requests, settings.generation, settings.seed)
