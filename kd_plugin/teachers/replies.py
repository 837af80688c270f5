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
_PADDED = 2  # rows of a head are fewer than this times the tokenizer's tokens
_NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Listed:
    """What a server lists at N positions.

    Attributes:
        ids: (N, K) int64, by falling probability; 0 beyond a position's tokens.
        logprobs: (N, K) float64 nats; -inf beyond a position's tokens.
        tail_logmass: (N,) float64 log of what is not listed.
        next_logprobs: (N,) float64 nats of the token that stands next.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    tail_logmass: NDArray[np.float64]
    next_logprobs: NDArray[np.float64]

    def at(self, index: NDArray[np.int64]) -> Listed:
        """Return some of the positions."""
        return Listed(self.ids[index], self.logprobs[index], self.tail_logmass[index], self.next_logprobs[index])


@dataclass(frozen=True)
class ServerCompletion:
    """A completion that a server generated.

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
        k: tokens listed a position beside the one that stands next; from 0 to ``vocab_size``.
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

    @property
    def _wanted(self) -> int:
        # All is asked for as -1: the server may have padded rows beyond the tokenizer.
        return -1 if self.whole else self.k

    def request(self, rows: Sequence[Sequence[int]], salt: str | None = None) -> dict[str, Any]:
        """Return the body of one request for the distribution before each token of ``rows`` but their first.

        Args:
            rows: token ids; one server answers all of them.
            salt: keeps a prefix cache that knows the field from answering out of what it holds.
        """
        salted = {} if salt is None else {"cache_salt": salt}
        return self._body(rows, 1) | {"prompt_logprobs": self._wanted, "return_token_ids": True} | salted

    def read(self, answer: Any, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Listed]:
        """Return for each of ``rows`` what ``answer`` says of the tokens after its ``positions``.

        Raises:
            ServerError: another model or for other tokens answered, or something is missing or impossible.
            NonFiniteError: NaN among the log-probabilities.
        """
        found = []
        for choice, tokens, at in zip(self._choices(answer, rows), rows, positions, strict=True):
            entries = choice.get("prompt_logprobs")
            if entries is None or len(entries) != len(tokens):
                raise ServerError(
                    f"{self.url} gave log-probabilities for {0 if entries is None else len(entries)} tokens where "
                    f"{len(tokens)} were sent; the prompt_logprobs of vLLM's /v1/completions are needed. Is it vLLM, "
                    "and does it not truncate prompts?"
                )
            chosen, next_ids = [entries[t + 1] for t in at], [tokens[t + 1] for t in at]
            found.append(read_entries(chosen, next_ids, self.k, self.vocab_size))
        return found

    def next_request(self, rows: Sequence[Sequence[int]], **sampling: float) -> dict[str, Any]:
        """Return the body of a request to generate one token after each of ``rows``, with its distribution.

        Args:
            rows: token ids.
            **sampling: settings in the place of neutral ones.
        """
        listed = {"logprobs": self._wanted, "return_tokens_as_token_ids": True, "ignore_eos": True}
        return self._body(rows, 1) | listed | sampling

    def read_next(self, answer: Any, rows: Sequence[Sequence[int]]) -> Listed:
        """Return the distributions of the tokens that ``answer`` generated after ``rows``; as many positions.

        Raises:
            ServerError: another model answered, or something is missing or impossible.
        """
        entries = []
        for choice in self._choices(answer, rows):
            try:
                entries.append(_by_id(choice["logprobs"]["top_logprobs"][0]))
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ServerError(
                    f"{self.url} generated a token without its log-probabilities ({error!r}); the top_logprobs of "
                    "vLLM's /v1/completions are needed."
                ) from error
        return read_entries(entries, [int(next(iter(entry))) for entry in entries], self.k, self.vocab_size)

    def generate_request(
        self, tokens: Sequence[int], max_tokens: int, seed: int, temperature: float, top_p: float, top_k: int
    ) -> dict[str, Any]:
        """Return the body of a request to go on from ``tokens``, with the distribution at each token generated."""
        return self._body([tokens], max_tokens) | {
            "seed": seed,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "logprobs": self._wanted,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def read_completion(self, answer: Any, tokens: Sequence[int], max_tokens: int) -> ServerCompletion:
        """Return what ``answer`` generated after ``tokens``, and the distributions that it was drawn from.

        Raises:
            ServerError: another model answered, or something is missing or impossible.
            NonFiniteError: NaN among the log-probabilities.
        """
        (choice,) = self._choices(answer, [tokens])
        try:
            ids, finished = [int(i) for i in choice["token_ids"]], choice["finish_reason"] == "stop"
            # An empty completion has no log-probabilities, or none at all
            entries = [_by_id(entry) for entry in choice["logprobs"]["top_logprobs"]] if ids else []
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.url} generated a completion without token_ids or top_logprobs ({error!r}); those of vLLM's "
                "/v1/completions are needed."
            ) from error
        if len(entries) != len(ids) or len(ids) > max_tokens:
            raise ServerError(
                f"{self.url} answered with {len(entries)} distributions for {len(ids)} tokens, where one a token and "
                f"{max_tokens} tokens at most were asked. Nothing of this answer was used."
            )
        return ServerCompletion(ids, finished, read_entries(entries, ids, self.k, self.vocab_size))

    def _body(self, rows: Sequence[Sequence[int]], max_tokens: int) -> dict[str, Any]:
        # Explicit settings, since a server mixes in the checkpoint's own for those that a request leaves out.
        return {"model": self.model, "prompt": [list(row) for row in rows], "max_tokens": max_tokens, **_NEUTRAL}

    def _choices(self, answer: Any, rows: Sequence[Sequence[int]]) -> list[Mapping[str, Any]]:
        """Return the answer to each of ``rows``; each must be one to the tokens that were sent."""
        try:
            model, choices = answer["model"], {int(choice["index"]): choice for choice in answer["choices"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} answered without {error}. Is it vLLM's /v1/completions?") from error
        if model != self.model:
            raise ServerError(
                f"{self.url} answered with model {model!r} where {self.model!r} was asked. Nothing of this answer was "
                "used. Let it serve that model again."
            )
        if sorted(choices) != list(range(len(rows))):
            raise ServerError(
                f"{self.url} gave {len(choices)} answers to {len(rows)} prompts of one request. Nothing of them was "
                "used. Is it vLLM's /v1/completions?"
            )
        for number, row in enumerate(rows):
            echo = choices[number].get("prompt_token_ids")
            if echo is not None and list(echo) != list(row):
                raise ServerError(
                    f"{self.url} answered for other tokens than were sent ({len(echo)} where {len(row)} were sent). "
                    "Nothing of this answer was used. Does something between here and it change or cache requests?"
                )
        return [choices[number] for number in range(len(rows))]


def _by_id(entry: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {name.removeprefix("token_id:"): {"logprob": value} for name, value in entry.items()}


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
        ServerError: fewer tokens than were asked for, the next one missing, or no log-probabilities.
        NonFiniteError: NaN among them.
    """
    n = len(entries)
    ids, logprobs = np.zeros((n, k), np.int64), np.full((n, k), -np.inf)
    tail, following = np.full(n, -np.inf), np.zeros(n)
    for row, (entry, next_id) in enumerate(zip(entries, next_ids, strict=True)):
        if entry is None or str(next_id) not in entry or len(entry) < k:
            seen = "nothing" if entry is None else f"{len(entry)} tokens"
            raise ServerError(
                f"The server gave {seen} for a position where {k} tokens and the next one (id {next_id}) were "
                "asked for. Is it vLLM, and does nothing between here and it shorten answers?"
            )
        tokens = np.fromiter(map(int, entry), np.int64, len(entry))
        values = np.fromiter((item["logprob"] for item in entry.values()), np.float64, len(entry))
        values[values <= _CLAMPED] = -np.inf
        if np.isnan(values).any():
            raise NonFiniteError("The server gave NaN for a log-probability. Check the weights that it serves.")
        real = tokens < vocab_size
        # The k likeliest of R rows hold k / R of the probability at least
        if np.exp(values).sum() < k / (_PADDED * vocab_size):
            raise ServerError(
                f"The server's {k} likeliest tokens at a position have a probability of {np.exp(values).sum():.3g} in "
                "all, which is less than any distribution gives them. Are these logits? Start it with the default "
                "--logprobs-mode raw_logprobs."
            )
        with np.errstate(divide="ignore"):
            values -= np.log1p(-min(np.exp(values[~real]).sum(), 1.0))
        following[row] = values[tokens == next_id][0]
        tokens, values = tokens[real], values[real]
        order = np.lexsort((tokens, -values))[:k]  # the next token comes beside the k and falls off the end
        mass = np.exp(values[order]).sum()
        if not mass <= 1 + _SLACK:
            raise ServerError(
                f"The server's log-probabilities at a position sum to a probability of {mass:.3g}. Start it with the "
                "default --logprobs-mode raw_logprobs."
            )
        ids[row, : len(order)], logprobs[row, : len(order)] = tokens[order], values[order]
        if k < vocab_size and mass < 1:
            tail[row] = np.log1p(-mass)
    return Listed(ids, logprobs, tail, following)
