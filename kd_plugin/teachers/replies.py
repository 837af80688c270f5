"""What a server's answer must hold before anything is learned from it.

Shape suffixes: N scored positions, K listed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.errors import NonFiniteError, ServerError

_CLAMPED = -9999.0  # vLLM writes it where a log-probability is -inf, which JSON has not
_SLACK = 0.01  # by which rounding may lift a sum of probabilities above one


@dataclass(frozen=True)
class Listed:
    """What a server lists at N positions.

    Attributes:
        ids: (N, K) int64, by falling probability; 0 beyond a position's tokens.
        logprobs: (N, K) float64 nats; -inf beyond a position's tokens.
        tail_logmass: (N,) float64 log of what is not listed.
        written: (N,) float64 nats of the token that stands next.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    tail_logmass: NDArray[np.float64]
    written: NDArray[np.float64]


@dataclass(frozen=True)
class Written:
    """A completion that a server wrote.

    Attributes:
        ids: its token ids, the end token included.
        finished: whether it ended by itself.
        listed: the distribution at each of its tokens, at temperature 1.
    """

    ids: list[int]
    finished: bool
    listed: Listed


@dataclass(frozen=True)
class Asking:
    """What is asked of a server, and what its answers are held against.

    Attributes:
        url: of the server, for messages.
        model: name that is sent; None before it is known.
        k: tokens listed a position, no more than ``vocab_size``.
        vocab_size: ids at or above it are padding.
    """

    url: str
    model: str | None
    k: int
    vocab_size: int

    @property
    def whole(self) -> bool:
        """Whether every token is listed, so that there is no tail."""
        return self.k == self.vocab_size

    def request(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Return the body of a request for the distribution before each of ``tokens`` but the first."""
        # All is asked for as -1: the server may have padded rows beyond the tokenizer.
        wanted = -1 if self.whole else self.k
        return {
            "model": self.model,
            "prompt": list(tokens),
            "prompt_logprobs": wanted,
            "max_tokens": 1,  # the least that vLLM takes
            "temperature": 0,
        }

    def read(self, answer: Any, tokens: Sequence[int], positions: Sequence[int]) -> Listed:
        """Return what ``answer`` says of the tokens after ``positions``.

        Raises:
            ServerError: another model answered, or something is missing or impossible.
            NonFiniteError: NaN among the log-probabilities.
        """
        try:
            model, entries = answer["model"], answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.url} answered without {error}; the prompt_logprobs of vLLM's /v1/completions are needed."
            ) from error
        if model != self.model:
            raise ServerError(
                f"{self.url} answered with model {model!r} where {self.model!r} was asked. Nothing of this answer was "
                "used. Let it serve that model again."
            )
        if entries is None or len(entries) != len(tokens):
            raise ServerError(
                f"{self.url} gave log-probabilities for {0 if entries is None else len(entries)} tokens where "
                f"{len(tokens)} were sent. Is it vLLM, and does it not truncate prompts?"
            )
        chosen, next_ids = [entries[t + 1] for t in positions], [tokens[t + 1] for t in positions]
        return read_entries(chosen, next_ids, self.k, self.vocab_size)

    def write_request(
        self, tokens: Sequence[int], max_tokens: int, seed: int, temperature: float, top_p: float, top_k: int
    ) -> dict[str, Any]:
        """Return the body of a request to go on from ``tokens``, with the distribution at each token written."""
        return {
            "model": self.model,
            "prompt": list(tokens),
            "max_tokens": max_tokens,
            "seed": seed,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            # Explicit, since a server mixes in the checkpoint's own generation settings.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": -1 if self.whole else self.k,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def read_written(self, answer: Any) -> Written:
        """Return what ``answer`` wrote, and the distributions that it was drawn from.

        Raises:
            ServerError: another model answered, or something is missing or impossible.
            NonFiniteError: NaN among the log-probabilities.
        """
        try:
            model, choice = answer["model"], answer["choices"][0]
            ids, finished = [int(i) for i in choice["token_ids"]], choice["finish_reason"] == "stop"
            listed = choice["logprobs"]["top_logprobs"] if ids else []
            entries = [
                {name.removeprefix("token_id:"): {"logprob": value} for name, value in entry.items()}
                for entry in listed
            ]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.url} wrote a completion without token_ids or top_logprobs ({error!r}); those of vLLM's "
                "/v1/completions are needed."
            ) from error
        if model != self.model or len(entries) != len(ids):
            raise ServerError(
                f"{self.url} answered with model {model!r} and {len(entries)} distributions for {len(ids)} tokens, "
                f"where {self.model!r} and one a token were asked. Nothing of this answer was used."
            )
        return Written(ids, finished, read_entries(entries, ids, self.k, self.vocab_size))


def read_entries(
    entries: Sequence[Mapping[str, Any] | None], next_ids: Sequence[int], k: int, vocab_size: int
) -> Listed:
    """Read the entries of some positions.

    Rows of the server's head beyond the tokenizer are no tokens: in process they are cut before the softmax, so
    here what is listed of them is taken out and the rest scaled up by as much.

    Args:
        entries: one mapping a position, token id (as text) to its ``logprob``.
        next_ids: the token that stands next, listed beside the others.
        k: tokens that were asked for; no more than ``vocab_size``.
        vocab_size: ids at or above it are padding.

    Raises:
        ServerError: fewer tokens than were asked for, the written one missing, or no log-probabilities.
        NonFiniteError: NaN among them.
    """
    n = len(entries)
    ids, logprobs = np.zeros((n, k), np.int64), np.full((n, k), -np.inf)
    tail, written = np.full(n, -np.inf), np.zeros(n)
    for row, (entry, next_id) in enumerate(zip(entries, next_ids, strict=True)):
        if entry is None or str(next_id) not in entry or len(entry) < k:
            seen = "nothing" if entry is None else f"{len(entry)} tokens"
            raise ServerError(
                f"The server gave {seen} for a position where {k} tokens and the written one (id {next_id}) were "
                "asked for. Is it vLLM, and does nothing between here and it shorten answers?"
            )
        tokens = np.fromiter(map(int, entry), np.int64, len(entry))
        values = np.fromiter((item["logprob"] for item in entry.values()), np.float64, len(entry))
        values[values <= _CLAMPED] = -np.inf
        if np.isnan(values).any():
            raise NonFiniteError("The server gave NaN for a log-probability. Check the weights that it serves.")
        real = tokens < vocab_size
        with np.errstate(divide="ignore"):
            values -= np.log1p(-min(np.exp(values[~real]).sum(), 1.0))
        written[row] = values[tokens == next_id][0]
        tokens, values = tokens[real], values[real]
        order = np.lexsort((tokens, -values))[:k]  # the written token comes beside the k and falls off the end
        mass = np.exp(values[order]).sum()
        if not mass <= 1 + _SLACK:
            raise ServerError(
                f"The server's log-probabilities at a position sum to a probability of {mass:.3g}. Start it with the "
                "default --logprobs-mode raw_logprobs."
            )
        ids[row, : len(order)], logprobs[row, : len(order)] = tokens[order], values[order]
        if k < vocab_size and mass < 1:
            tail[row] = np.log1p(-mass)
    return Listed(ids, logprobs, tail, written)
