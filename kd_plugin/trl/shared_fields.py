"""Fields that the configurations of both trainers have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DistillationFields:
    """What both ways of distilling share; a base beside TRL's own configuration."""

    skew_alpha: float = field(default=0.1, metadata={"help": "Share of the teacher in skew_kl's mixture, in [0, 1)."})
    lineage: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "License lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, "
            "overrides and run. What it leaves out is discovered."
        },
    )
