"""How a teacher is asked to write; writing.py does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kd_plugin.cache.fields import fitting
from kd_plugin.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """How the teacher writes completions; recorded in the manifest.

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
