"""What TRL's trainer does not let one say when it calls its model's ``generate`` (1.16)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import StoppingCriteriaList


@contextmanager
def generating(model: Any, **options: Any) -> Iterator[None]:
    """Have ``model.generate`` called with further arguments inside the block.

    Blocks may stand in one another; their ``stopping_criteria`` add up.
    """
    generate, before = model.generate, vars(model).get("generate")

    def called(*args: Any, **own: Any) -> Any:
        both = [*(options.get("stopping_criteria") or ()), *(own.get("stopping_criteria") or ())]
        criteria = {"stopping_criteria": StoppingCriteriaList(both)} if both else {}
        return generate(*args, **{**options, **own, **criteria})

    model.generate = called
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before
