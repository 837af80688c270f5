"""Teachers on a Lightning trainer's devices."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

from kd_plugin.errors import ConfigError
from kd_plugin.lightning.student import as_trained
from kd_plugin.panel import TeacherPanel
from kd_plugin.sharding.inference import shard_for_inference, shard_with_fsdp2
from kd_plugin.teachers.placing import Placement, place
from kd_plugin.vocab import Vocabulary


def place_teachers(
    panel: TeacherPanel,
    trainer: Trainer,
    module: LightningModule,
    student: Any,
    vocabulary: Vocabulary,
    *,
    shard_teachers: bool = False,
) -> None:
    """Load the teachers that run in this process, and place them; see :func:`~kd_plugin.teachers.placing.place`.

    Under ZeRO-3 and FSDP2, and with ``shard_teachers`` under ZeRO-1 and 2, a teacher is cut over the ranks; elsewhere
    each rank holds it whole.

    Args:
        panel: the teachers.
        trainer: for its strategy, which has set up the student.
        module: for its device.
        student: the student, of a PEFT model its base.
        vocabulary: of the student.
        shard_teachers: shard them under ZeRO-1 and 2 too.

    Raises:
        ConfigError: a placement that cannot be.
    """
    strategy: Any = trainer.strategy
    cuts = isinstance(strategy, DeepSpeedStrategy) and (strategy.zero_stage_3 or shard_teachers)

    def wrap(model: nn.Module) -> nn.Module:
        if cuts:
            return shard_for_inference(model, strategy.config)
        if isinstance(strategy, ModelParallelStrategy):
            return shard_with_fsdp2(model, mesh=strategy.device_mesh["data_parallel"], reshard_after_forward=True)
        return model.to(module.device)

    placement = Placement(as_trained(module, student), vocabulary, module.device, wrap, shards_move=cuts)
    place(panel.teachers.values(), placement)


def require_placeable(trainer: Trainer, *, shard_teachers: bool) -> None:
    """Refuse ``shard_teachers`` where nothing cuts them, before anything is loaded.

    Raises:
        ConfigError: says which strategy it needs, and what can be.
    """
    if shard_teachers and not isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"shard_teachers needs DeepSpeed or FSDP2, and the strategy is {type(trainer.strategy).__name__}. Use "
            "DeepSpeedStrategy or ModelParallelStrategy, or placement='offload' for teachers that do not fit."
        )
