"""TRL's collator, with the cached targets of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd_plugin.cache import TeacherCache
from kd_plugin.cache.joining import TARGET, batch_targets


@dataclass
class TeacherTargetCollator:
    """Wraps TRL's collator, which builds only the fields that it knows.

    It runs in the data loader's workers, so that targets are read from disk ahead of the step.

    Attributes:
        inner: the collator of the SFT trainer.
        cache: where ``teacher_index`` points to.
    """

    inner: Any
    cache: TeacherCache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``, and add under ``teacher_target`` what :func:`batch_targets` gathers."""
        batch = self.inner(examples)
        batch[TARGET] = batch_targets(self.cache, batch["labels"], [example["teacher_index"] for example in examples])
        return batch
