"""What the panel's step asks of a transformers trainer: its state, its checkpoints, its devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from kd_plugin.monitor.watch import lower_learning_rate
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.identity import ResumeState, write_state
from kd_plugin.sharding import shard_for_inference, shard_with_fsdp2
from kd_plugin.teachers.in_process import Placement, place
from kd_plugin.trainers.upstream import save_checkpoint_now
from kd_plugin.vocab import Vocabulary

logger = logging.get_logger(__name__)


class TrainerHost:
    """A transformers trainer as :class:`~kd_plugin.panel.batches.Host`.

    Args:
        trainer: the trainer.
        metrics: under ``train`` and ``eval`` lists of values by name, which the trainer averages when it logs.
    """

    def __init__(self, trainer: Any, metrics: Mapping[str, MutableMapping[str, list[float]]]) -> None:
        self.trainer = trainer
        self.metrics = metrics

    @property
    def device(self) -> torch.device:
        """Where the student computes."""
        return self.trainer.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.trainer.accelerator.process_index

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.trainer.accelerator.num_processes

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.trainer.state.global_step

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.trainer.model.training

    @property
    def is_logged(self) -> bool:
        """Whether the optimizer step that is being made will be logged; evaluations always are."""
        if not self.training:
            return True
        step, args, state = self.step + 1, self.trainer.args, self.trainer.state
        by_step = args.logging_strategy == "steps" and step % max(state.logging_steps, 1) == 0
        return by_step or (step == 1 and args.logging_first_step) or 0 < state.max_steps <= step

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor of each rank."""
        return self.trainer.accelerator.reduce(values, reduction="sum")

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep values until the next log."""
        for name, value in metrics.items():
            self.metrics["train" if self.training else "eval"].setdefault(name, []).append(value)

    def stop(self) -> None:
        """Save, and end training."""
        self.trainer.control.should_training_stop = self.trainer.control.should_save = True

    def lower_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate, and its schedule's base."""
        scheduler: Any = getattr(self.trainer.lr_scheduler, "scheduler", self.trainer.lr_scheduler)
        lower_learning_rate(self.trainer.optimizer, scheduler, factor)


class PanelStateCallback(TrainerCallback):
    """Tells the panel of optimizer steps, and writes into every checkpoint which panel taught and what it keeps."""

    def __init__(self, resume: ResumeState, follow: Callable[[], None]) -> None:
        self._resume, self._follow = resume, follow

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell it from which step training goes on."""
        self._follow()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell it; a checkpoint of this step is written after it."""
        self._follow()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write it, on the process that writes checkpoints."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir():
            write_state(checkpoint, self._resume.state_dict())


def save_what_was_learned(trainer: Trainer) -> None:
    """Save a checkpoint of the last finished step, unless there is one; for a run that a server's death ends.

    Under DeepSpeed and FSDP saving takes all ranks, and only some may know of the failure, so nothing is saved there.
    """
    args, step = trainer.args, trainer.state.global_step
    if step == 0 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not args.should_save:
        return
    checkpoint = Path(args.output_dir, f"checkpoint-{step}")
    if not checkpoint.is_dir():
        save_checkpoint_now(trainer)
    logger.error(
        f"A server is gone, or is another one. What was learned in {step} steps is in {checkpoint}. Once it is back, "
        "go on with trainer.train(resume_from_checkpoint=True), or the command with --resume_from_checkpoint true."
    )


def last_hidden_states(student: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return (B, L, H) what the student's backbone makes of (B, L) tokens; call it inside the student's forward pass.

    Args:
        student: unwrapped; of a PEFT model the base is run, with its adapter.
        input_ids: (B, L).
        attention_mask: (B, L).
    """
    model: PreTrainedModel = student.get_base_model() if hasattr(student, "get_base_model") else student
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def place_under_accelerate(trainer: Any, panel: TeacherPanel, vocabulary: Vocabulary) -> None:
    """Load the teachers that run in this process, and place them; see :func:`~kd_plugin.teachers.in_process.place`.

    Under ZeRO-3, and with ``shard_teachers`` under ZeRO-1 and 2, each teacher is sharded over the ranks; under FSDP2
    likewise. Elsewhere each rank has a replica.

    Raises:
        ConfigError: a placement that cannot be.
    """
    accelerator = trainer.accelerator
    zero3 = trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3
    shards = zero3 or (trainer.is_deepspeed_enabled and trainer.panel_settings.shard_teachers)

    def wrap(model: nn.Module) -> nn.Module:
        if shards:
            return shard_for_inference(model, accelerator.state.deepspeed_plugin.deepspeed_config)
        if trainer.is_deepspeed_enabled:
            return trainer.replicated_teacher(model)
        if accelerator.is_fsdp2:
            return shard_with_fsdp2(model, reshard_after_forward=True, **_fsdp2_options(accelerator))
        return accelerator.prepare_model(model, evaluation_mode=True)

    student = accelerator.unwrap_model(trainer.model)
    place(
        panel.teachers.values(),
        Placement(student, vocabulary, accelerator.device, wrap, shards_move=shards, student_is_sharded_later=zero3),
    )


def _fsdp2_options(accelerator: Any) -> dict[str, Any]:
    """Return how accelerate shards the student, for a teacher to be sharded alike."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    return {
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
    }
