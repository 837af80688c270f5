"""What the on-policy step asks of the trainer that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Host(Protocol):
    """A trainer, as the step and the monitor see it.

    A host has three things of its own: how it is called, how its student generates (a
    :class:`~kd_plugin.rollouts.RolloutEngine`), and how a sum over tokens is divided.
    """

    @property
    def device(self) -> torch.device:
        """Where the student computes."""
        ...

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def ranks(self) -> int:
        """Number of processes."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        ...

    @property
    def training(self) -> bool:
        """Whether the present batch is trained on, and not evaluated."""
        ...

    @property
    def is_logged(self) -> bool:
        """Whether what is seen of the present batch is logged when its optimizer step is done."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor of each rank; a collective call."""
        ...

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep what a generation batch was like until the next log."""
        ...

    def stop(self) -> None:
        """Save what was learned, and end training."""
        ...

    def lower_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate, and the schedule that goes on from it."""
        ...
