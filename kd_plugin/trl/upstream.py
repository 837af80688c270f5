"""What this host relies on inside TRL; ``tests/contract`` holds it, each behaviour by a test."""

from __future__ import annotations

from typing import Any


class TrlMetricsMixin:
    """Logs what an evaluation measured under TRL's own names.

    TRL 1.16 keeps lists of metrics by mode, and its ``log`` takes their means and the prefix.
    """

    _metrics: dict[str, Any]

    def report_evaluated(self, means: dict[str, float], metrics: dict[str, float], prefix: str) -> None:
        """Put the means beside the loss into what is logged."""
        self._metrics["eval"].update({name: [mean] for name, mean in means.items()})
