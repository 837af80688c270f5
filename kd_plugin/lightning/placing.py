"""Teachers on the trainer's devices: whole, offloaded, or sharded like the student."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from kd_plugin.errors import ConfigError
from kd_plugin.lightning.student import as_trained, shards_the_student
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.checks import require_placements
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.vocab import Vocabulary
from kd_plugin.zero.teachers import shard_for_inference, through_engine


def place_teachers(
    panel: TeacherPanel,
    trainer: Trainer,
    module: LightningModule,
    student: Any,
    vocabulary: Vocabulary,
    *,
    shard_teachers: bool = False,
) -> None:
    """Load the teachers that run in this process.

    Under ZeRO-3, and with ``shard_teachers`` under ZeRO-1 and 2, a teacher is sharded over the ranks; elsewhere each
    rank holds it whole, or moves it in for each generation batch where its placement is ``offload``.

    Args:
        panel: the teachers.
        trainer: for its strategy.
        module: for its device.
        student: the student, of a PEFT model its base.
        vocabulary: of the student.
        shard_teachers: shard them under ZeRO-1 and 2 too.
    """
    strategy = trainer.strategy
    zero3 = isinstance(strategy, DeepSpeedStrategy) and (strategy.zero_stage_3 or shard_teachers)
    for teacher in panel.teachers.values():
        if isinstance(teacher, AdapterTeacher):
            if teacher.uses_student:
                teacher.use_student(as_trained(module, student), student.config._name_or_path, vocabulary)
            elif teacher.base is not None and teacher.base.placement == "resident":
                teacher.base.model.to(module.device)
        elif isinstance(teacher, LocalTeacher):
            OutputHead.from_model(teacher.model)  # raises early where the teacher has no head
            if zero3:
                _shard(teacher, strategy)
            elif teacher.placement == "resident":
                teacher.model.to(module.device)


def require_placeable(panel: TeacherPanel, trainer: Trainer, *, shard_teachers: bool = False) -> None:
    """Refuse placements that the strategy cannot give, before anything is loaded.

    Raises:
        ConfigError: names the teacher, and what can be.
    """
    strategy = trainer.strategy
    if shard_teachers and not isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"shard_teachers needs DeepSpeed, and the strategy is {type(strategy).__name__}. Use DeepSpeedStrategy, or "
            "placement='offload' for teachers that do not fit."
        )
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        require_placements(panel, "ZeRO-3", refused=("adapter", "offload"))
    elif shard_teachers:
        require_placements(panel, "shard_teachers", refused=("offload",))
    elif shards_the_student(trainer):
        require_placements(panel, "FSDP2", refused=("adapter",))


def _shard(teacher: LocalTeacher, strategy: Any) -> None:
    """Cut a teacher over all ranks; every pass of it then is one of all ranks, which scoring sees to."""
    engine = shard_for_inference(teacher.model, strategy.config)
    teacher.attach(through_engine(engine))
