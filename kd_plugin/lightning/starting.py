"""The student as it was before the first step, for ``anchor_weight``; also where a checkpoint is loaded over it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lightning.pytorch import LightningModule

from kd_plugin.lightning.student import builds_later


class StartKeeper:
    """Calls ``take`` when the module's model is there and no checkpoint was loaded over it.

    Lightning restores weights between ``configure_model`` and ``on_fit_start``, so a model that is built there is
    looked at as soon as ``configure_model`` returns.

    Args:
        module: whose student is kept.
        take: keeps it; called once.
    """

    def __init__(self, module: LightningModule, take: Callable[[], None]) -> None:
        self._module = module
        self._wrapped = builds_later(module)
        if not self._wrapped:
            take()
            return
        inner = module.configure_model
        taken = False

        @functools.wraps(inner)
        def configure_model() -> None:
            nonlocal taken
            inner()
            if not taken:
                taken = True
                take()

        module.configure_model = configure_model  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the module its own ``configure_model`` back."""
        if self._wrapped:
            self._module.__dict__.pop("configure_model", None)
