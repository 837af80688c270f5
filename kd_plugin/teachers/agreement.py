"""Whether a server's answers agree with one another: what is asked twice must be answered alike.

Behind one address there may be several servers, or a proxy that keeps answers, and each answer looks right by itself.
So every request carries a short probe beside its row, and some rows are asked for twice.

Shape suffixes: N positions, K listed tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_plugin.errors import ServerError
from kd_plugin.teachers.client import Client
from kd_plugin.teachers.replies import Asking, Listed, ServerCompletion

ROUNDING = 0.25  # nats on average; bfloat16 engines were seen to differ by up to 0.2 at single tokens
_OUTLIER = 1.0  # nats by which a single position may be farther off, where an expert is routed otherwise
_FLOOR = -30.0  # nats below which log-probabilities count as equal
_SHORT, _LONG = 8, 33  # tokens of the probes
_COMPARED, _SHARED = 8, 16  # likeliest tokens of a position, and positions of a common prefix, that are compared
_REPEAT_EVERY = 8  # rows, of which one is asked for twice
_WAY_OUT = (
    "Nothing of it was used. Do several servers with different weights stand behind this address, or does something "
    "before it keep answers? Name one server, or serve the same weights from all, and start again."
)


@dataclass(frozen=True)
class Probes:
    """Token sequences from all over the vocabulary, whose log-probabilities tell one set of weights from another.

    Attributes:
        short: goes with every request.
        long: longer than a block of a prefix cache; goes with the rows that are asked for twice.
    """

    short: tuple[int, ...]
    long: tuple[int, ...]

    @classmethod
    def of(cls, vocab_size: int, longest: int | None) -> Probes:
        """Return the probes for so many tokens and a server that takes rows of so many, None for any."""
        short = np.linspace(0, vocab_size - 1, _SHORT + 2).astype(int)[1:-1]
        long = np.linspace(0, vocab_size - 1, min(vocab_size, _LONG)).astype(int)
        return cls(tuple(short[:longest].tolist()), tuple(long[:longest].tolist()))


@dataclass(frozen=True)
class Reference:
    """What a server said of the probes when it was first asked.

    Attributes:
        url: of the server, for messages.
        probes: what was asked.
        short: (N,) float64 nats of the tokens of the short probe after its first.
        long: likewise of the long one.
    """

    url: str
    probes: Probes
    short: NDArray[np.float64]
    long: NDArray[np.float64]

    def require_short(self, found: Listed) -> None:
        """Refuse an answer whose short probe is not what it was; see :func:`require_alike`."""
        require_alike(self.url, "a probe that goes with every request", distances(self.short, found.next_logprobs))

    def require_long(self, found: Listed) -> None:
        """Refuse an answer whose long probe is not what it was; see :func:`require_alike`."""
        require_alike(self.url, "a probe", distances(self.long, found.next_logprobs))

    def ask(
        self,
        client: Client,
        asking: Asking,
        prompts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        twice: int | None,
    ) -> list[Listed]:
        """Ask for rows, each with the short probe, and last for one of them again, with the long one.

        Args:
            client: the way to the server.
            asking: what is asked of it.
            prompts: token ids.
            positions: of each row, those after which the next token's distribution is wanted.
            twice: number of the row that is asked for again; None for none.

        Raises:
            ServerError: it stayed away, its answer lacks something, or it answers one question in two ways.
        """
        bodies = [asking.request([tokens, self.probes.short]) for tokens in prompts]
        own = replace(asking, k=0)  # the row's own tokens are enough to compare
        if twice is not None:
            bodies.append(own.request([prompts[twice], self.probes.long], salt=secrets.token_hex(8)))

        def read(number: int, answer: Any) -> Listed:
            again = number == len(prompts)
            row, probe = (twice, self.probes.long) if again and twice is not None else (number, self.probes.short)
            rows, wanted = [prompts[row], probe], [positions[row], range(len(probe) - 1)]
            found, probed = (own if again else asking).read(answer, rows, wanted)
            (self.require_long if again else self.require_short)(probed)
            return found

        found = client.post_all("/v1/completions", bodies, read)
        if twice is not None:
            apart = distances(found[twice].next_logprobs, found.pop().next_logprobs)
            require_alike(self.url, f"a row of {len(prompts[twice])} tokens", apart)
        return found

    def score_again(
        self,
        client: Client,
        asking: Asking,
        prompts: Sequence[Sequence[int]],
        done: Sequence[ServerCompletion],
        twice: int | None,
        longest: int | None,
    ) -> None:
        """Refuse completions whose log-probabilities are not those of the same tokens, given as prompts.

        Args:
            client: the way to the server.
            asking: what is asked of it.
            prompts: token ids.
            done: the completion of each, of at least one token.
            twice: number of the row that is asked for again; None for none.
            longest: tokens that a row may have; None for any.

        Raises:
            ServerError: see :meth:`ask`.
        """
        rows = [[*prompt, *one.ids][:longest] for prompt, one in zip(prompts, done, strict=True)]
        wanted = [range(len(prompt) - 1, len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
        scored = self.ask(client, replace(asking, k=0), rows, wanted, twice)
        apart = [
            distances(one.listed.next_logprobs[: len(again.next_logprobs)], again.next_logprobs)
            for one, again in zip(done, scored, strict=True)
        ]
        for one in apart:
            require_alike(self.url, "a generated completion, given as a prompt,", one)
        require_alike(self.url, "what was generated, given as prompts,", np.concatenate(apart))


class Repeats:
    """Which rows are asked for twice: one of every few, and one of the first that are asked for."""

    def __init__(self) -> None:
        self._since, self._turn = _REPEAT_EVERY, 0

    def next(self, rows: int) -> int | None:
        """Return the row, of so many that are asked for now, to ask for twice; None for none of them."""
        self._since += rows
        if self._since < _REPEAT_EVERY:
            return None
        self._since, self._turn = 0, self._turn + 1
        return self._turn * 7919 % rows  # of no pattern that a proxy or a sampler shares


def distances(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far log-probabilities of the same tokens are apart, (N,) nats."""
    return np.abs(floored(mine) - floored(theirs))


def floored(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log-probabilities without those so low that their differences, or -inf, say nothing."""
    return np.maximum(logprobs, _FLOOR)


def listed_distances(mine: Listed, theirs: Listed) -> NDArray[np.float64]:
    """Return how far two lists of each of N positions are apart, (N,) nats.

    It is the mean over the likeliest tokens of ``mine``, weighted by their probabilities. A token that ``theirs`` does
    not list has at most the probability of the last one that it lists.
    """
    ids, logprobs = mine.ids[:, :_COMPARED], floored(mine.logprobs[:, :_COMPARED])
    there = floored(theirs.logprobs)
    same = ids[:, :, None] == theirs.ids[:, None, :]
    found = np.where(same, there[:, None, :], -np.inf).max(2)
    at_most = np.minimum(logprobs, there[:, -1:])
    other = np.where(np.isfinite(found), found, at_most)
    weights = np.exp(logprobs)
    return np.asarray((weights * np.abs(logprobs - other)).sum(1) / weights.sum(1))


def require_alike(url: str, what: str, found: NDArray[np.float64]) -> None:
    """Refuse two answers that are farther apart than rounding explains.

    Args:
        url: of the server.
        what: was asked for twice.
        found: (N,) nats between the two.

    Raises:
        ServerError: their mean is above :data:`ROUNDING`, with room for one position that is an outlier.
    """
    if not len(found):
        return
    allowed = ROUNDING + _OUTLIER / len(found)
    if not float(found.mean()) <= allowed:
        raise ServerError(
            f"{url} answers one question in two ways: {what} is {found.mean():.2f} nats from what it was, on average "
            f"over {len(found)} tokens, where rounding explains {allowed:.2f}. {_WAY_OUT}"
        )


def require_same_prefixes(
    url: str, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], listed: Sequence[Listed]
) -> None:
    """Refuse rows that begin alike and whose distributions there differ: those depend on what stands before alone.

    Args:
        url: of the server.
        rows: token ids.
        positions: of each row, in any order.
        listed: what the server said there.

    Raises:
        ServerError: see :func:`require_alike`.
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    every = []
    for a, b in pairwise(order):
        common = _common_prefix(rows[a], rows[b])
        shared = np.intersect1d(positions[a], positions[b])
        shared = shared[shared < common][-_SHARED:]
        if len(shared):
            mine, theirs = (_at(listed[i], positions[i], shared) for i in (a, b))
            found = np.maximum(listed_distances(mine, theirs), listed_distances(theirs, mine))
            # Before the rows part, the next token is the same too
            found = np.where(
                shared + 1 < common, np.maximum(found, distances(mine.next_logprobs, theirs.next_logprobs)), found
            )
            require_alike(url, "a position in two rows that begin alike", found)
            every.append(found)
    if every:
        require_alike(url, "what stands in rows that begin alike", np.concatenate(every))


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differ[0]) if len(differ) else length


def _at(listed: Listed, positions: Sequence[int], wanted: NDArray[np.int64]) -> Listed:
    order = np.argsort(positions)
    return listed.at(order[np.searchsorted(positions, wanted, sorter=order)])
