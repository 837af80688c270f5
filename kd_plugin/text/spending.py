"""What text costs: tokens, and money by prices that the user gives, up to a ceiling."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, ServerError, require_known_keys
from kd_plugin.text.writers import Answer, Ask, Usage

_PER = 1e6  # tokens that a price is for
_BYTES_OF_MESSAGE = 64  # tokens that a template may put around a message, at most, for the bound before an answer


@dataclass(frozen=True)
class Prices:
    """Prices in the user's currency for a million tokens.

    Attributes:
        read: of the prompt.
        written: reasoning included.
        cached: of the prompt, from the server's cache; None as ``read``.

    Raises:
        ConfigError: a negative price.
    """

    read: float = 0.0
    written: float = 0.0
    cached: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (isinstance(value, int | float) and 0 <= value < float("inf")):
                raise ConfigError(f"prices: {name}={value!r}: expected the price of a million tokens, 0 or more.")

    @classmethod
    def of(cls, given: Mapping[str, Any] | Prices | None) -> Prices:
        """Read ``{read: 0.55, written: 2.19, cached: 0.14}``.

        Raises:
            ConfigError: an unknown key, or a value that is no price.
        """
        if given is None or isinstance(given, Prices):
            return given or cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f"prices: expected a mapping {{read: 0.55, written: 2.19}}, found {given!r}.")
        require_known_keys(given, [f.name for f in dataclasses.fields(cls)], "prices")
        return cls(**given)

    def cost(self, usage: Usage) -> float:
        """Return what ``usage`` costs."""
        cached = self.read if self.cached is None else self.cached
        return ((usage.read - usage.cached) * self.read + usage.cached * cached + usage.written * self.written) / _PER

    def most(self, ask: Ask) -> float:
        """Return what ``ask`` costs at most: a token has at least one byte."""
        read = sum(len(m["content"].encode()) + _BYTES_OF_MESSAGE for m in ask.messages)
        return self.cost(Usage(read, ask.generation.max_new_tokens))


@dataclass(frozen=True)
class Spent:
    """What a run took, over all its processes.

    Attributes:
        usage: teacher's name to what it read and wrote.
        costs: teacher's name to what that cost.
        generated: tokens that the student generated.
    """

    usage: Mapping[str, Usage] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    generated: int = 0

    @property
    def spent(self) -> float:
        """What all teachers together cost."""
        return sum(self.costs.values())

    def as_bytes(self) -> bytes:
        """Return it as a file keeps it."""
        teachers = {name: {**asdict(one), "cost": self.costs.get(name, 0.0)} for name, one in self.usage.items()}
        return (json.dumps({"student_generated": self.generated, "teachers": teachers}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Spent:
        """Return what a file keeps; nothing where there is none.

        Raises:
            ConfigError: it is damaged.
        """
        if not path.is_file():
            return cls()
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            costs = {name: float(one.pop("cost")) for name, one in kept["teachers"].items()}
            return cls({n: Usage(**one) for n, one in kept["teachers"].items()}, costs, int(kept["student_generated"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}), so what the run has spent is not known. Write into it what its teachers "
                "have cost, or delete it to count from 0."
            ) from error


class Budget:
    """What was spent and what is under way, against a ceiling that is never passed.

    Args:
        ceiling: in the currency of the prices; None for none.

    Raises:
        ConfigError: the ceiling is negative.
    """

    def __init__(self, ceiling: float | None = None) -> None:
        if ceiling is not None and not ceiling >= 0:
            raise ConfigError(f"ceiling={ceiling}: expected 0 or more, in the currency of the prices.")
        self.ceiling = ceiling
        self.usage: dict[str, Usage] = {}
        self.costs: dict[str, float] = {}
        self.uncounted: dict[str, int] = {}
        self._under_way = 0.0

    @property
    def spent(self) -> float:
        """What all answers together cost."""
        return sum(self.costs.values())

    def resume(self, name: str, usage: Usage, cost: float) -> None:
        """Count what a teacher took before this process began."""
        self.usage[name] = self.usage.get(name, Usage()) + usage
        self.costs[name] = self.costs.get(name, 0.0) + cost

    def reserve(self, prices: Prices, ask: Ask) -> bool:
        """Set aside what ``ask`` costs at most; False, and nothing set aside, where that would pass the ceiling."""
        most = prices.most(ask)
        if self.ceiling is not None and self.spent + self._under_way + most > self.ceiling:
            return False
        self._under_way += most
        return True

    def release(self, prices: Prices, ask: Ask) -> None:
        """Take back what was set aside for ``ask``: there is no answer."""
        self._under_way -= prices.most(ask)
        if self._under_way < 1e-12:
            self._under_way = 0.0

    def settle(self, name: str, prices: Prices, ask: Ask, answer: Answer) -> None:
        """Count an answer in the place of what was set aside for it.

        Raises:
            ServerError: there is a ceiling, and the server does not count.
        """
        self.release(prices, ask)
        self.count(name, prices, answer.usage if answer.ended != "refused" else answer.usage or Usage())

    def count(self, name: str, prices: Prices, usage: Usage | None) -> None:
        """Count the tokens of an answer that writer ``name`` gave; raises as :meth:`settle`."""
        if usage is None:
            if self.ceiling is not None and prices != Prices():
                raise ServerError(
                    f"Writer {name!r} does not say how many tokens an answer has (`usage`), so that the ceiling of "
                    f"{self.ceiling:g} cannot be held. Leave ceiling or prices out, or use a server that counts."
                )
            self.uncounted[name] = self.uncounted.get(name, 0) + 1
            return
        self.usage[name] = self.usage.get(name, Usage()) + usage
        self.costs[name] = self.costs.get(name, 0.0) + prices.cost(usage)
