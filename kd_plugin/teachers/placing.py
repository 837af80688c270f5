"""Where the teachers of this process lie: whole, in host memory, or sharded over the ranks like the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kd_plugin.teachers.base import Teacher
from kd_plugin.vocab import Vocabulary


@dataclass(frozen=True)
class Placement:
    """What a host offers to the teachers of this process.

    Attributes:
        student: the base of adapters that have none of their own; of a PEFT model that model itself.
        vocabulary: of the student.
        device: that the student computes on.
        wrap: puts a frozen model where a resident teacher lies, whole or sharded, and returns the module whose forward
            pass runs it there, which may be the model itself.
        shards_move: whether ``wrap`` shards models in parts that may rest in host memory; if not, an offloaded teacher
            waits there whole.
        student_is_sharded_later: whether the student, whole now, will be sharded when training starts.
        placed: teachers that have their place already; several adapters may share one base.
    """

    student: Any
    vocabulary: Vocabulary
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]
    shards_move: bool = False
    student_is_sharded_later: bool = False
    placed: list[Teacher] = field(default_factory=list)


def place(teachers: Iterable[Teacher], placement: Placement) -> None:
    """Load the teachers that run in this process, and have each lie where the host has it.

    A teacher with ``placement="offload"`` has what a rank holds of it in host memory while it does not score. An
    adapter runs over its base as that is placed. A teacher without a method ``place`` looks after itself.

    Raises:
        ConfigError: a teacher without a head, an adapter that does not fit its base or cannot run over shards.
    """
    for teacher in teachers:
        own = getattr(teacher, "place", None)
        if own is not None and not any(teacher is one for one in placement.placed):
            placement.placed.append(teacher)
            own(placement)
