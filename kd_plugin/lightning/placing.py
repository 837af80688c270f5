"""Teachers on the trainer's devices: whole, offloaded, or sharded like the student."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.checks import require_placements
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import AdapterTeacher, LocalTeacher
from kd_plugin.vocab import Vocabulary
from kd_plugin.zero.teachers import shard_for_inference, through_engine


def place_teachers(
    panel: TeacherPanel, trainer: Trainer, module: LightningModule, student: Any, vocabulary: Vocabulary
) -> None:
    """Load the teachers that run in this process.

    Under ZeRO-3 a resident teacher is sharded over the ranks; elsewhere each rank holds it whole, or moves it in for
    each generation batch where its placement is ``offload``.

    Args:
        panel: the teachers.
        trainer: for its strategy.
        module: for its device.
        student: the student, of a PEFT model its base.
        vocabulary: of the student.

    Raises:
        ConfigError: a placement that the strategy cannot give.
    """
    strategy = trainer.strategy
    zero3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    for teacher in panel.teachers.values():
        if isinstance(teacher, AdapterTeacher):
            if teacher.uses_student:
                adapted = next((m for m in module.modules() if hasattr(m, "peft_config")), student)
                teacher.use_student(adapted, student.config._name_or_path, vocabulary)
            elif teacher.base is not None and teacher.base.placement == "resident":
                teacher.base.model.to(module.device)
        elif isinstance(teacher, LocalTeacher):
            OutputHead.from_model(teacher.model)  # raises early where the teacher has no head
            if zero3:
                _shard(teacher, strategy)
            elif teacher.placement == "resident":
                teacher.model.to(module.device)


def require_placeable(panel: TeacherPanel, trainer: Trainer) -> None:
    """Refuse placements that the strategy cannot give, before anything is loaded.

    Raises:
        ConfigError: names the teacher, and what can be.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        require_placements(panel, "ZeRO-3", refused=("adapter", "offload"))
    elif isinstance(strategy, ModelParallelStrategy):
        require_placements(panel, "FSDP2", refused=("adapter",))


def _shard(teacher: LocalTeacher, strategy: Any) -> None:
    """Cut a teacher over all ranks; every pass of it then is one of all ranks, which scoring sees to."""
    engine = shard_for_inference(teacher.model, strategy.config)
    teacher.attach(through_engine(engine))
