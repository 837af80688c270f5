"""What a capture is asked for: what is kept of the teacher's distribution, and how the teacher generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kd_plugin.cache.files import fitting
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


@dataclass(frozen=True)
class Generation:
    """How the teacher generates completions; recorded in the manifest.

    Attributes:
        n: completions a prompt.
        max_new_tokens: tokens of a completion at most.
        temperature: of the sampling; 0 takes the likeliest token. That of the stored targets is another one.
        top_p: sample from the likeliest tokens that reach this mass.
        top_k: sample from the k likeliest tokens; 0 from all.
        keep_unfinished: keep completions that reach ``max_new_tokens`` without an end.
    """

    n: int = 1
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_new_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"Generation({name}={value!r}): expected a whole number of at least {least}.")
        if not self.temperature >= 0:
            raise ConfigError(f"Generation(temperature={self.temperature}): expected 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"Generation(top_p={self.top_p}): expected above 0 and at most 1.")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError(
                f"Generation(n={self.n}, temperature=0): the likeliest completion is one. Use n=1, or a temperature "
                "above 0."
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Generation:
        """Build from the values of :meth:`to_json`; raises CacheError or ConfigError where they are none."""
        return cls(**fitting(cls, values, "generation"))
