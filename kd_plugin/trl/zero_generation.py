"""How a TRL trainer lets its student write under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import StoppingCriteriaList
from transformers.utils import logging

from kd_plugin.sharding.gathering import most_of_any_rank
from kd_plugin.sharding.generation import Progress, free_bytes, missing_bytes, slow_notice
from kd_plugin.trl.generating import generating

logger = logging.get_logger(__name__)


class ShardedGenerationMixin:
    """Gathers the student's weights for generation under ZeRO-3 if they fit, and else says that it will be slow."""

    args: Any
    accelerator: Any
    _fits: bool | None = None

    @contextmanager
    def gathered_where_they_fit(self, model: Any) -> Iterator[None]:
        """Let ``model``, the unwrapped student, write inside the block; a collective call the first time."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None  # type: ignore[attr-defined]
        if plugin is None or plugin.zero_stage != 3:
            yield
            return
        if self._fits is None:
            self._decide(model)
        if self.args.ds3_gather_for_generation:
            yield
            return
        limit, says = self.args.max_completion_length, self.accelerator.is_main_process
        with generating(model, stopping_criteria=StoppingCriteriaList([Progress(limit, says=says)])):
            yield

    def _decide(self, model: Any) -> None:
        """Look once whether gathered weights fit on every rank; all ranks must do the same."""
        device = self.accelerator.device
        free = free_bytes(device)
        too_large = free is not None and missing_bytes(model) > free
        self._fits = most_of_any_rank([int(too_large)], device) == [0]
        if self.args.ds3_gather_for_generation and not self._fits:
            self.args.ds3_gather_for_generation = False
        if not self.args.ds3_gather_for_generation and self.accelerator.is_main_process:
            logger.warning(slow_notice(model, self.accelerator.num_processes, fits=self._fits))
