"""Evaluation as a mean over tokens, whatever the batches and the ranks."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from kd_plugin.monitor.token_means import TokenMeans

logger = logging.get_logger(__name__)


class TokenMeanMixin:
    """Makes of a trainer's ``eval_loss`` the mean over all scored tokens, as the loss of one batch would be.

    transformers (5.23) takes the mean of the batches' means, in which the tokens of small batches count for more, and
    a batch without any counts as a loss of 0. While :attr:`evaluated` is set the trainer adds to it what each batch
    sums: the parts of the loss under names that begin with ``loss``, which are added up, and metrics under their names.
    """

    accelerator: Any
    evaluated: TokenMeans | None = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as the parent does, and give means over tokens."""
        self.evaluated = TokenMeans()
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self.evaluated.read(gather_object)
        finally:
            self.evaluated = None
        losses = {name: mean for name, mean in means.items() if name.startswith("loss")}
        if losses:
            defined = [mean for mean in losses.values() if mean is not None]
            output.metrics[f"{metric_key_prefix}_loss"] = sum(defined) if defined else float("nan")
            if not defined:
                logger.warning(f"{description}: no token was scored, so {metric_key_prefix}_loss is NaN.")
        own = {name: 0.0 if mean is None else mean for name, mean in means.items() if name not in losses}
        self.report_evaluated(own, output.metrics, metric_key_prefix)
        return output

    def report_evaluated(self, means: dict[str, float], metrics: dict[str, float], prefix: str) -> None:
        """Put the means beside the loss into what is logged."""
        metrics.update({f"{prefix}_{name}": mean for name, mean in means.items()})

    def rows_of_its_own(self, rows: int) -> int:
        """Return how many of the ``rows`` of this rank's present batch, from the first on, are not repeats.

        accelerate fills the last batch of all ranks with the first rows again. It cannot tell of a streamed dataset how
        many they are, and neither can this.
        """
        state = self.accelerator.gradient_state
        if not state.in_dataloader or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
