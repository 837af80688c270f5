"""TRL's collator, with the cached targets of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd_plugin.cache.completeness import Untaught, taught_batch
from kd_plugin.cache.joining import TARGET
from kd_plugin.cache.joint import JointCache


@dataclass
class TeacherTargetCollator:
    """Wraps TRL's collator, which builds only the fields that it knows.

    It runs in the data loader's workers, so that targets are read from disk ahead of the step.

    Attributes:
        inner: the collator of the SFT trainer.
        cache: where the columns ``teacher_index`` point to.
        untaught: what becomes of tokens with a label and no target.
    """

    inner: Any
    cache: JointCache
    untaught: Untaught

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``, and add under ``teacher_target`` what :func:`taught_batch` gathers."""
        batch = self.inner(examples)
        indices = {column: [example[column] for example in examples] for column in self.cache.columns}
        batch["labels"], batch[TARGET] = taught_batch(self.cache, batch["labels"], indices, self.untaught)
        return batch
