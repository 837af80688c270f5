"""Teachers on a TRL trainer's devices: whole, in host memory, or cut over the ranks like the student."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from trl.models import prepare_deepspeed

from kd_plugin.panel import TeacherPanel
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.vocab import Vocabulary
from kd_plugin.zero.sharding import is_sharded, move, whole_on_each_rank
from kd_plugin.zero.teachers import shard_for_inference, shard_with_fsdp2


def place_teachers(trainer: Any, panel: TeacherPanel, vocabulary: Vocabulary) -> None:
    """Load the teachers that run in this process, and place them.

    Under ZeRO-3, and with ``shard_teachers`` under ZeRO-1 and 2, each rank holds a part of each teacher; under FSDP2
    likewise. Elsewhere each rank holds them whole. A teacher with ``placement="offload"`` has what a rank holds of it
    in host memory while it does not score. An adapter runs over its base as that is placed.

    Args:
        trainer: for its accelerator, its arguments and its student.
        panel: the teachers.
        vocabulary: of the student.

    Raises:
        ConfigError: a placement that cannot be.
    """
    adapters = [teacher for teacher in panel.teachers.values() if isinstance(teacher, AdapterTeacher)]
    for teacher in adapters:
        # A tree over the base's tensors is made before wrappers put their hooks on the base
        if teacher.uses_student:
            student = trainer.accelerator.unwrap_model(trainer.model)
            teacher.use_student(student, student.config._name_or_path, vocabulary)
        OutputHead.from_model(teacher.model)  # loads it now, so that what does not fit is refused here
    local = [teacher for teacher in panel.teachers.values() if isinstance(teacher, LocalTeacher)]
    bases = [teacher.base for teacher in adapters if teacher.base is not None]
    for base in {id(teacher): teacher for teacher in [*local, *bases]}.values():  # each once
        _place(trainer, base)
    for teacher in adapters:
        # A student that was loaded whole is cut later, when training starts
        if is_sharded(teacher.model) or (teacher.uses_student and _stage(trainer) == 3):
            teacher.run_over_shards()
        if teacher.base is None or teacher.base.placement == "resident":
            teacher.model.to(trainer.accelerator.device)


def _place(trainer: Any, teacher: LocalTeacher) -> None:
    """Place one teacher, or the base of adapters."""
    accelerator = trainer.accelerator
    with nullcontext() if trainer.is_deepspeed_enabled else whole_on_each_rank():
        model = teacher.model
    OutputHead.from_model(model)  # raises early where the teacher has no head
    offloaded = teacher.placement == "offload"
    if trainer.is_deepspeed_enabled and (trainer.args.shard_teachers or _stage(trainer) == 3):
        wrapped = shard_for_inference(model, accelerator.state.deepspeed_plugin.deepspeed_config)
        if offloaded:
            move(model, "cpu")
    elif offloaded:
        return
    elif trainer.is_deepspeed_enabled:
        wrapped = prepare_deepspeed(model, accelerator)
    elif accelerator.is_fsdp2:
        wrapped = shard_with_fsdp2(model, **_fsdp2_options(accelerator))
    else:
        wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    unwrapped = accelerator.unwrap_model(wrapped)
    teacher.attach(lambda method, *inputs: trainer._forward_redirection(wrapped, unwrapped, method, *inputs))


def _stage(trainer: Any) -> int:
    return trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0


def _fsdp2_options(accelerator: Any) -> dict[str, Any]:
    """Return how accelerate cuts the student, for a teacher to be cut alike."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    return {
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
    }
