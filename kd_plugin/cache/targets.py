"""What is kept of the teacher's distribution at each scored position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

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
