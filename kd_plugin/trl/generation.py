"""How a TRL trainer lets its student write under ZeRO-3, and hooks into transformers' generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from kd_plugin.zero.generation import Progress, free_bytes, missing_bytes, slow_notice
from kd_plugin.zero.sharding import most_of_any_rank

logger = logging.get_logger(__name__)


@contextmanager
def stopped_by(model: Any, criterion: Callable[[int], StoppingCriteria]) -> Iterator[None]:
    """Add a criterion to every generation of ``model`` inside the block; TRL passes none to it (1.16).

    Args:
        model: the student, unwrapped.
        criterion: called with the width of the padded prompts.
    """
    before, generate = model.__dict__.get("generate"), model.generate

    def wrapped(*args: Any, stopping_criteria: Any = None, **options: Any) -> Any:
        mine = criterion(options["input_ids"].size(1))
        return generate(*args, stopping_criteria=StoppingCriteriaList([*(stopping_criteria or ()), mine]), **options)

    model.generate = wrapped
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


class ShardedGenerationMixin:
    """Gathers the student's weights for generation under ZeRO-3 if they fit, and else says that it will be slow."""

    args: Any
    accelerator: Any
    _fits: bool | None = None

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None  # type: ignore[attr-defined]
        if plugin is None or plugin.zero_stage != 3 or self.use_vllm:  # type: ignore[attr-defined]
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]
        model = self.accelerator.unwrap_model(self.model_wrapped)  # type: ignore[attr-defined]
        if self._fits is None:
            self._decide(model)
        if self.args.ds3_gather_for_generation:
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]
        limit, says = self.args.max_completion_length, self.accelerator.is_main_process
        with stopped_by(model, lambda start: Progress(start, limit, says=says)):
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

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
