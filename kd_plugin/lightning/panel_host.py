"""A Lightning trainer as the host of the panel's step: its state, its devices, and its student's start."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn

from kd_plugin.errors import ConfigError
from kd_plugin.lightning.step import WINDOW, Prepared
from kd_plugin.lightning.student import builds_later
from kd_plugin.monitor.watch import lower_learning_rate
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.batches import MicroBatch, StepLoss
from kd_plugin.panel.step import PanelStep
from kd_plugin.panel.warmup import WarmupBatch
from kd_plugin.rollouts.vllm.ahead import begin_windows
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.sharding import shard_for_inference, shard_with_fsdp2
from kd_plugin.signals import OutputHead
from kd_plugin.student.head import as_trained
from kd_plugin.teachers.in_process import Placement, place
from kd_plugin.vocab import Vocabulary

_ROW = ("prompt", "completion", "teacher_id", "domain", "teacher_weights")


class LightningHost:
    """A Lightning trainer as :class:`~kd_plugin.panel.batches.Host`.

    Args:
        trainer: the trainer.
        module: the module that trains.

    Attributes:
        noted: what the last generation batch of training was like.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.noted: dict[str, float] = {}
        self._wants_a_stop = False

    @property
    def device(self) -> torch.device:
        """Where the student computes."""
        return self.module.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.trainer.global_rank

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.trainer.world_size

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.trainer.global_step

    @property
    def training(self) -> bool:
        """Whether the trainer is in its training loop."""
        return self.trainer.training

    @property
    def is_logged(self) -> bool:
        """Whether the optimizer step that is being made will be logged."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.training and every > 0 and (self.step + 1) % every == 0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor of each rank."""
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep values of training until they are logged."""
        if self.training:
            self.noted.update(metrics)

    def stop(self) -> None:
        """Save, and end training, when the accumulation window is done; see :meth:`stop_if_wanted`."""
        self._wants_a_stop = True

    def stop_if_wanted(self) -> None:
        """End training after an alarm that asks for it; what was learned is saved first."""
        if not self._wants_a_stop:
            return
        self._wants_a_stop = False
        self.trainer.should_stop = True
        directory = getattr(self.trainer.checkpoint_callback, "dirpath", None) or self.trainer.default_root_dir
        self.trainer.save_checkpoint(Path(directory, f"alarm-step={self.step}.ckpt"))

    def lower_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate of each optimizer, and its schedule's base."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for number, optimizer in enumerate(self.trainer.optimizers):
            lower_learning_rate(optimizer, schedules[number] if number < len(schedules) else None, factor)


@dataclass(frozen=True)
class PanelObjective:
    """What the student's forward pass computes: the loss of the panel's step.

    Attributes:
        ce_weight: weight of the module's own loss.
        step: the panel's step, once there is one.
    """

    ce_weight: float
    step: PanelStep | None = None

    @property
    def forms_own(self) -> bool:
        """Whether :meth:`loss` can form the labels' cross-entropy in the same pass: it does not."""
        return False

    def without_own(self) -> PanelObjective:
        """Return the same objective without the module's own loss."""
        return replace(self, ce_weight=0.0)

    def loss(self, hidden: Tensor, head: OutputHead, target: Any) -> StepLoss:
        """Return the loss of a micro-batch; see :meth:`~kd_plugin.panel.step.PanelStep.loss`."""
        assert self.step is not None
        return self.step.loss(hidden, head, target)


def place_under_strategy(
    panel: TeacherPanel,
    trainer: Trainer,
    module: LightningModule,
    student: Any,
    vocabulary: Vocabulary,
    *,
    shard_teachers: bool = False,
) -> None:
    """Load the teachers that run in this process, and place them; see :func:`~kd_plugin.teachers.in_process.place`.

    Under ZeRO-3 and FSDP2, and with ``shard_teachers`` under ZeRO-1 and 2, a teacher is sharded over the ranks;
    elsewhere each rank has a replica. The strategy has set up the student, of a PEFT model its base.

    Raises:
        ConfigError: a placement that cannot be.
    """
    strategy: Any = trainer.strategy
    shards = isinstance(strategy, DeepSpeedStrategy) and (strategy.zero_stage_3 or shard_teachers)

    def wrap(model: nn.Module) -> nn.Module:
        if shards:
            return shard_for_inference(model, strategy.config)
        if isinstance(strategy, ModelParallelStrategy):
            return shard_with_fsdp2(model, mesh=strategy.device_mesh["data_parallel"], reshard_after_forward=True)
        return model.to(module.device)

    placement = Placement(as_trained(module, student), vocabulary, module.device, wrap, shards_move=shards)
    place(panel.teachers.values(), placement)


def require_placeable(trainer: Trainer, *, shard_teachers: bool) -> None:
    """Refuse ``shard_teachers`` where nothing shards them, before anything is loaded.

    Raises:
        ConfigError: says which strategy it needs, and what can be.
    """
    if shard_teachers and not isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"shard_teachers needs DeepSpeed or FSDP2, and the strategy is {type(trainer.strategy).__name__}. Use "
            "DeepSpeedStrategy or ModelParallelStrategy, or placement='offload' for teachers that do not fit."
        )


def prepared(batch: MicroBatch | WarmupBatch, window_tokens: float | None) -> Prepared:
    """Return what the module's step sees of a micro-batch."""
    seen = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    return Prepared(seen, batch, batch.labels, tuple(batch.input_ids.shape), batch.tokens, window_tokens)


def count_of(batch: Any) -> int:
    """Return the number of prompts in a batch."""
    return len(batch["prompt"])


def rows_of(batches: Sequence[Any], further: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return all rows of some batches, one mapping each; None where a batch lacks a column of the panel's own.

    Args:
        batches: columns by name.
        further: columns that a row has where its batch has them.
    """
    return [
        {name: batch[name][i] if batch.get(name) is not None else None for name in _ROW}
        | {name: batch[name][i] for name in further if batch.get(name) is not None}
        for batch in batches
        for i in range(count_of(batch))
    ]


def place_of(batch: Any) -> tuple[int, int] | None:
    """Return the number of a batch's window and its place in it; None where the loader tells neither."""
    told = batch.get(WINDOW)
    return None if told is None else (told["number"], told["place"])


def begin_fetched(engine: ServerEngine, step: PanelStep, batch: Any, seed: int, max_steps: int) -> None:
    """Have the responses to windows generated that were fetched with this batch; a collective call.

    Args:
        engine: of the student.
        step: of the panel.
        batch: the first of its window.
        seed: of the run.
        max_steps: of the run; -1 for no limit.
    """
    steps = range(step.settings.warmup_cache_steps, sys.maxsize if max_steps < 0 else max_steps)
    begin_windows(
        engine,
        batch[WINDOW]["fetched"],
        lambda batches: step.responder.prompts(rows_of(batches)),
        steps=steps,
        seed=seed,
    )


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
