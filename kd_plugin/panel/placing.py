"""Where the teachers of this process lie: whole, in host memory, or cut over the ranks like the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.signals import OutputHead
from kd_plugin.teachers.adapter import AdapterTeacher
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.vocab import Vocabulary
from kd_plugin.zero.sharding import is_sharded, move, swapped_apart, whole_on_each_rank
from kd_plugin.zero.teachers import through


def place(
    panel: TeacherPanel,
    student: Any,
    vocabulary: Vocabulary,
    *,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module],
    parts_move: bool = False,
    student_is_cut_later: bool = False,
) -> None:
    """Load the teachers that run in this process, and have each lie where the host has it.

    A teacher with ``placement="offload"`` has what a rank holds of it in host memory while it does not score. An
    adapter runs over its base as that is placed.

    Args:
        panel: the teachers.
        student: the base of adapters that have none of their own; of a PEFT model that model itself.
        vocabulary: of the student.
        device: that the student computes on.
        wrap: puts a frozen model where a resident teacher lies, whole or cut, and returns the module whose forward
            pass runs it there, which may be the model itself.
        parts_move: whether ``wrap`` cuts models in parts that may rest in host memory; if not, an offloaded teacher
            waits there whole.
        student_is_cut_later: whether the student, whole now, will be cut over ranks when training starts.

    Raises:
        ConfigError: a teacher without a head, an adapter that does not fit its base, or one that cannot run over parts.
    """
    local = [teacher for teacher in panel.teachers.values() if isinstance(teacher, LocalTeacher)]
    adapters = [teacher for teacher in panel.teachers.values() if isinstance(teacher, AdapterTeacher)]
    bases = [teacher.base for teacher in adapters if teacher.base is not None]
    for base in {id(teacher): teacher for teacher in [*local, *bases]}.values():  # each once
        _place_model(base, wrap, parts_move)
    for adapter in adapters:
        if adapter.uses_student:
            adapter.use_student(student, student.config._name_or_path, vocabulary)
        OutputHead.from_model(adapter.model)  # loads it now, so that what does not fit is refused here
        if is_sharded(adapter.model) or (adapter.uses_student and student_is_cut_later):
            adapter.run_over_shards()
        if adapter.base is None or adapter.base.placement == "resident":
            move(adapter.model, device, parts=False)


def _place_model(teacher: LocalTeacher, wrap: Callable[[nn.Module], nn.Module], parts_move: bool) -> None:
    """Place one teacher, or the base of adapters; one that an earlier run cut stays as it is."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if teacher.is_attached and teacher.is_sharded:
        return
    with swapped_apart() if is_deepspeed_zero3_enabled() else whole_on_each_rank():
        model = teacher.model
    OutputHead.from_model(model)  # raises early where the teacher has no head
    offloaded = teacher.placement == "offload"
    if offloaded and not parts_move:
        return
    teacher.attach(through(wrap(model), model))
    if offloaded:
        move(model, "cpu")
