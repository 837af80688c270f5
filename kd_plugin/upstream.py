"""Private names of transformers, torch and PEFT that the core relies on, each with what is relied on.

No other file of the core uses one, and ``tests/contract/test_upstream.py`` holds both: that, and the behaviour.
"""

from __future__ import annotations

from typing import Any


def reference_of(model: Any) -> str:
    """Return the path or hub id that a model or its configuration was loaded from; of a string the string itself.

    transformers 5.23 keeps it in ``config._name_or_path`` alone; empty for a model that was built in memory.
    """
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", model), "_name_or_path", None) or ""
