"""What is kept of the teacher's distribution at each scored position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kd_plugin.errors import ConfigError, nearest

MAX_DRAWS = 32_767  # counts are mapped as 16-bit signed integers

KeptLogprobs = Literal["mean", "each"]


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens with their log-probabilities, and the log of the mass that is left out.

    Deterministic and truncated: nothing is known about the tokens that are not listed.

    Attributes:
        k: tokens kept at a position; a vocabulary of fewer tokens is kept whole.
    """

    k: int = 64

    def __post_init__(self) -> None:
        _require_count("TopK", "k", self.k)


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn with replacement from the full distribution, with their counts.

    Unbiased: the expectation of counts / draws is the teacher's distribution, whatever its tail
    (Anshumann et al., "Sparse Logit Sampling", arXiv 2503.16870, section 4).

    Attributes:
        draws: tokens drawn at a position.
        logprobs: ``mean`` keeps of the teacher's log-probabilities one number a position, the mean over the draws,
            which is all that the forward KL takes of them; ``each`` keeps that of every token drawn.
    """

    draws: int = 50
    logprobs: KeptLogprobs = "mean"

    def __post_init__(self) -> None:
        _require_count("Sampled", "draws", self.draws)
        if self.draws > MAX_DRAWS:
            raise ConfigError(f"Sampled(draws={self.draws}) is above {MAX_DRAWS}, the most that a count can hold.")
        if self.logprobs not in get_args(KeptLogprobs):
            known = list(get_args(KeptLogprobs))
            raise ConfigError(
                f"Sampled(logprobs={self.logprobs!r}): expected one of {', '.join(known)}."
                + nearest(str(self.logprobs), known)
            )


@dataclass(frozen=True)
class TopP:
    """The most probable tokens that together reach the mass p, at most ``cap`` of them.

    Few tokens where the teacher is sure, many where it is not. Truncated like :class:`TopK`.

    Attributes:
        p: mass to reach, in (0, 1).
        cap: tokens kept at most.
    """

    p: float = 0.98
    cap: int = 256

    def __post_init__(self) -> None:
        _require_count("TopP", "cap", self.cap)
        if not 0.0 < self.p < 1.0:
            raise ConfigError(f"TopP(p={self.p}): expected a mass strictly between 0 and 1. For all tokens use TopK.")


Targets = TopK | TopP | Sampled

_KINDS: dict[str, type[TopK] | type[TopP] | type[Sampled]] = {"top_k": TopK, "top_p": TopP, "sampled": Sampled}


@dataclass(frozen=True)
class Extracted:
    """Targets of N positions, flat: those of position n are ``counts[n]`` consecutive entries.

    Attributes:
        counts: (N,) int32.
        ids: int32 token ids; by falling probability for top-k, by rising id for sampled.
        logprobs: float16 nats, rounded to nearest: off by at most 2^-11 of the value (0.004 nats at -8).
        tail_logmass: (N,) float32 log of the probability not listed, -inf when all is.
        draws: uint16 counts of each token, or None.
        mean_logprob: (N,) float32 mean over the draws of their log-probability in nats, or None.
    """

    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    tail_logmass: NDArray[np.float32]
    draws: NDArray[np.uint16] | None
    mean_logprob: NDArray[np.float32] | None = None

    def split(self, positions: Sequence[int]) -> list[Extracted]:
        """Take the targets of N positions apart into those of consecutive examples of so many positions each."""
        ends = np.cumsum(positions)
        entry_ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        parts = []
        for end, count in zip(ends, positions, strict=True):
            at = slice(end - count, end)
            entries = slice(entry_ends[end - count], entry_ends[end])
            parts.append(
                Extracted(
                    self.counts[at],
                    self.ids[entries],
                    self.logprobs[entries],
                    self.tail_logmass[at],
                    None if self.draws is None else self.draws[entries],
                    None if self.mean_logprob is None else self.mean_logprob[at],
                )
            )
        return parts

    @classmethod
    def concatenate(cls, parts: list[Extracted]) -> Extracted:
        """Join parts in order."""
        draws = [part.draws for part in parts if part.draws is not None]
        means = [part.mean_logprob for part in parts if part.mean_logprob is not None]
        return cls(
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.tail_logmass for part in parts]),
            np.concatenate(draws) if draws else None,
            np.concatenate(means) if means else None,
        )


def describe(targets: Targets) -> dict[str, Any]:
    """Return ``targets`` as plain values: its kind and its fields."""
    kind = next(name for name, cls in _KINDS.items() if type(targets) is cls)
    fields = asdict(targets)
    # The first version of the format kept each log-probability and had no name for it
    if isinstance(targets, Sampled) and targets.logprobs == "each":
        del fields["logprobs"]
    return {"kind": kind, **fields}


def from_description(description: Mapping[str, Any]) -> Targets:
    """Build the targets that :func:`describe` described.

    Raises:
        ConfigError: unknown kind, or fields that the kind does not have.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("kind"), str):
        raise ConfigError(f"Targets are {description!r:.80}; expected a mapping with their kind.")
    fields = dict(description)
    kind = fields.pop("kind", None)
    if kind == "sampled":
        fields.setdefault("logprobs", "each")
    if kind not in _KINDS:
        raise ConfigError(
            f"Unknown kind of targets {kind!r}; expected one of {', '.join(_KINDS)}." + nearest(str(kind), list(_KINDS))
        )
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ConfigError(f"Targets of kind {kind!r} do not take {sorted(fields)}: {error}.") from error


def _require_count(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{owner}({name}={value!r}): expected a whole number of at least 1.")
