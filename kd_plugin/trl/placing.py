"""Teachers on a TRL trainer's devices."""

from __future__ import annotations

from typing import Any

from torch import nn
from trl.models import prepare_deepspeed

from kd_plugin.panel import TeacherPanel
from kd_plugin.sharding.inference import shard_for_inference, shard_with_fsdp2
from kd_plugin.teachers.placing import Placement, place
from kd_plugin.vocab import Vocabulary


def place_teachers(trainer: Any, panel: TeacherPanel, vocabulary: Vocabulary) -> None:
    """Load the teachers that run in this process, and place them; see :func:`~kd_plugin.teachers.placing.place`.

    Under ZeRO-3, and with ``shard_teachers`` under ZeRO-1 and 2, each rank holds a part of each teacher; under FSDP2
    likewise. Elsewhere each rank holds them whole.

    Args:
        trainer: for its accelerator, its arguments and its student.
        panel: the teachers.
        vocabulary: of the student.

    Raises:
        ConfigError: a placement that cannot be.
    """
    accelerator = trainer.accelerator
    zero3 = trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3
    cuts = zero3 or (trainer.is_deepspeed_enabled and trainer.args.shard_teachers)

    def wrap(model: nn.Module) -> nn.Module:
        if cuts:
            return shard_for_inference(model, accelerator.state.deepspeed_plugin.deepspeed_config)
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(model, accelerator)
        if accelerator.is_fsdp2:
            return shard_with_fsdp2(model, reshard_after_forward=True, **_fsdp2_options(accelerator))
        return accelerator.prepare_model(model, evaluation_mode=True)

    student = accelerator.unwrap_model(trainer.model)
    place(
        panel.teachers.values(),
        Placement(
            student,
            vocabulary,
            accelerator.device,
            wrap,
            shards_move=cuts,
            student_is_sharded_later=zero3,
        ),
    )


def _fsdp2_options(accelerator: Any) -> dict[str, Any]:
    """Return how accelerate cuts the student, for a teacher to be cut alike."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    return {
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
    }
