"""A module's ``training_step`` with the distillation loss, the callbacks that add it, and the windows of a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from kd_plugin.cache.joining import mean_over_taught
from kd_plugin.cache.loading import ResumableLoader
from kd_plugin.divergence import require_finite
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lightning.student import (
    builds_later,
    loss_of,
    require_launchable,
    require_resumable_ranks,
    require_returned_loss,
    require_supported,
    shards_the_student,
)
from kd_plugin.lightning.upstream import divide_once, prepare_for_zero3
from kd_plugin.limits import refuse_prompt_learning, refuse_router_loss
from kd_plugin.student.forward import Call, DistillingForward, beside
from kd_plugin.student.head import as_trained, config_of, find_student

# What the plugin puts into a batch and takes out again before the module sees it
WINDOW_TOKENS = "kd_window_tokens"
WINDOW = "kd_window"
SAMPLES = "kd_samples"  # prompts that are answered at validation, and not measured


@dataclass(frozen=True)
class Prepared:
    """A batch that is ready for the module's step.

    Attributes:
        batch: what the module sees.
        target: of the objective.
        labels: (B, L) labels in the batch, or None.
        shape: (B, L) of the batch.
        tokens: scored tokens of this rank's micro-batch; a number, or a tensor on the device.
        window_tokens: those of this rank's whole accumulation window, where the loader knows them.
        taught: those of ``tokens`` that have a target, where some may have none; on all ranks, or on none.
    """

    batch: Any
    target: Any
    labels: Tensor | None
    shape: tuple[int, ...]
    tokens: int | Tensor
    window_tokens: float | Tensor | None = None
    taught: int | None = None


class ReplacedStep:
    """Takes the place of a module's ``training_step`` until :meth:`remove`.

    Args:
        trainer: the trainer.
        module: whose step is wrapped.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self._inner, self._had_own = module.training_step, "training_step" in module.__dict__
        self._divide_twice = divide_once(trainer)
        step = functools.wraps(self._inner)(lambda batch, *rest: self(batch, *rest))
        module.training_step = step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the module its own step back."""
        self._divide_twice()
        if self._had_own:
            self.module.training_step = self._inner  # type: ignore[method-assign]
        else:
            del self.module.training_step

    def __call__(self, batch: Any, *rest: Any) -> Any:
        """Return the module's output with the loss that is trained on."""
        raise NotImplementedError


class DistillingStep(ReplacedStep):
    """Takes the place of a module's ``training_step`` until :meth:`remove`.

    The loss is ``ce_weight`` times the module's own loss plus the divergence. The divergence, and the loss that the
    student returns, are sums over scored tokens divided by their number over all ranks (and over the accumulation
    window, where the loader tells it), so that ranks and micro-batches of different lengths give the gradient of one
    large batch. A loss that the module forms itself is averaged over ranks and micro-batches as Lightning does it.

    Args:
        trainer: the trainer.
        module: whose step is wrapped.
        forward: the patched student.
        prepare: turns a batch into what the module and the objective need.
        report: is told the loss of each step, for logging.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        forward: DistillingForward,
        prepare: Callable[[Any], Prepared],
        report: Callable[[Call, Tensor], None],
    ) -> None:
        super().__init__(trainer, module)
        self.forward = forward
        self._prepare = prepare
        self._report = report
        self._joint = True

    def __call__(self, batch: Any, *rest: Any) -> Any:
        """Run the module's step on ``batch`` and return its output with the loss that is trained on."""
        prepared = self._prepare(batch)
        weight = self.forward.objective.ce_weight
        normalizer = divisor(self.trainer, self.module, prepared.tokens, prepared.window_tokens)
        if prepared.taught is not None:
            taught = _share(self.trainer, self.module, prepared.taught, None)
            mean_over_taught([prepared.target], float(normalizer), float(taught))
        call, output, own = self._run(prepared, rest, normalizer)
        formed = call.own is not None
        if formed and weight != 0.0 and not call.is_own(own):
            # The step does more with its loss than to return it: from now on it gets one with a graph of its own
            self._joint = formed = False
            call, output, own = self._run(prepared, rest, normalizer)
        assert call.trained is not None
        total = call.trained.to(normalizer.dtype)
        nothing = isinstance(prepared.tokens, int) and prepared.tokens == 0  # the mean over no labels is no number
        if not formed and weight != 0.0 and not nothing:
            total = total + weight * own
        elif isinstance(own, Tensor) and own.requires_grad and (formed or shards_the_student(self.trainer)):
            # A wrapper that passes on nothing but the loss gathers for the backward pass by that
            total = beside(total, own)
        self._report(call, total)
        return with_loss(output, total)

    def _run(self, prepared: Prepared, rest: Any, normalizer: Tensor) -> tuple[Call, Any, Any]:
        """Return the call, what the module's step returned, and the loss in it."""
        call = Call(prepared.target, prepared.labels, prepared.shape, self._joint, normalizer)
        with self.forward.step(call):
            output = self._inner(prepared.batch, *rest)
        if call.found is None:
            raise ConfigError(
                f"{type(self.module).__name__}.training_step did not run the student over the batch's input_ids of "
                f"shape {call.shape}, so there is nothing to compare with the teacher. Pass the batch's input_ids to "
                "the student as they are."
            )
        return call, output, loss_of(output, self.module)


def divisor(
    trainer: Trainer, module: LightningModule, tokens: int | Tensor, window_tokens: float | Tensor | None
) -> Tensor:
    """Return the divisor of this rank's sum; Lightning averages over ranks and over the accumulation window.

    Args:
        trainer: the trainer.
        module: that trains.
        tokens: of this rank's micro-batch.
        window_tokens: those of its whole accumulation window, where the loader knows them.
    """
    total = _share(trainer, module, tokens, window_tokens)
    if trainer.world_size > 1:
        return total.clamp(min=1e-9)
    return total.clamp(min=1.0 / trainer.accumulate_grad_batches)


def _share(trainer: Trainer, module: LightningModule, tokens: int | Tensor, window: float | Tensor | None) -> Tensor:
    """Return a rank's share of a number of tokens over all ranks and the accumulation window."""
    total = torch.zeros((), device=module.device) + (tokens if window is None else window)
    world = trainer.world_size
    if world > 1:
        total = trainer.strategy.reduce(total, reduce_op="sum") / world
    # Lightning divides by the batches of a full window, and an epoch's last may have fewer
    batches = 1 if window is not None else window_size(trainer, trainer.fit_loop.batch_idx)
    return total * (batches / trainer.accumulate_grad_batches)


def without(batch: Any, *names: str) -> Any:
    """Return a shallow copy of a mapping without some keys: the module's step may pass all of it to its model."""
    if not any(name in batch for name in names):
        return batch
    shorter = copy.copy(batch)
    for name in names:
        shorter.pop(name, None)
    return shorter


def require_mapping(batch: Any, key: str, way_out: str) -> None:
    """Refuse a batch without ``key``.

    Raises:
        DataError: says what is there and the way out.
    """
    if not isinstance(batch, Mapping | MutableMapping) and not hasattr(batch, "keys"):
        raise DataError(f"The batch is a {type(batch).__name__}; a dictionary with {key!r} is needed. {way_out}")
    if key not in batch:
        raise DataError(f"The batch has no {key!r}; it has {', '.join(map(repr, batch.keys()))}. {way_out}")


def with_loss(output: Any, total: Tensor) -> Any:
    """Return what a step returned, with another loss."""
    if not hasattr(output, "get"):
        return total
    replaced = dict(output)
    replaced["loss"] = total
    return replaced


def window_end(trainer: Trainer, batch: int) -> int:
    """Return the number in its epoch of the first batch behind the window of ``batch``.

    Lightning steps at the last batch of an epoch whether its window is full or not. Which one is the last depends on
    ``limit_train_batches``, ``overfit_batches`` and the loader. DeepSpeed counts batches itself, over epochs.
    """
    accumulate = trainer.accumulate_grad_batches
    end = (batch // accumulate + 1) * accumulate
    if trainer.strategy.handles_gradient_accumulation:
        return end
    return int(min(end, trainer.num_training_batches))


def window_size(trainer: Trainer, batch: int) -> int:
    """Return the number of batches in the window of ``batch``; the full number where an epoch's end is not known."""
    return window_end(trainer, batch) - batch // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches


def served(trainer: Trainer | None, batches: int) -> int:
    """Return how many of an epoch's ``batches`` make whole windows, where the strategy needs those; else all."""
    if trainer is None or not trainer.strategy.handles_gradient_accumulation:
        return batches
    return batches - batches % trainer.accumulate_grad_batches or batches


def require_whole_windows(trainer: Trainer) -> None:
    """Refuse epochs that end inside a window, where the strategy would fill it up from the next epoch.

    A loader that looks ahead sees one epoch, so the window's tokens would be counted wrong. Other loaders divide each
    batch by its own tokens, which holds wherever the window ends.

    Raises:
        ConfigError: names the numbers, and a limit that fits.
    """
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    strategy, loader = trainer.strategy, trainer.train_dataloader
    if not strategy.handles_gradient_accumulation or not isinstance(loader, ResumableLoader):
        return
    if batches != float("inf") and batches % accumulate:
        whole = int(batches - batches % accumulate)
        way_out = f"limit_train_batches: {whole}" if whole else f"accumulate_grad_batches: {int(batches)} or less"
        raise ConfigError(
            f"An epoch has {int(batches)} batches a rank and accumulate_grad_batches is {accumulate}: under "
            f"{type(strategy).__name__} its last optimizer step would take batches of the next epoch. Set {way_out}."
        )


class StudentCallback(Callback):
    """Checks before anything is loaded, and leaves the module as it was; a subclass joins its forward pass and step.

    Attributes:
        brings_lineage: these callbacks start the run's lineage themselves.
        loss_name: how an error calls the loss.
        objective: what is minimised; its ``ce_weight`` is that of the module's own loss.
        student: attribute path of the student, where the module holds several models.
        windows_ahead: optimizer steps whose rows the loader fetches before theirs.
    """

    brings_lineage = True
    windows_ahead = 0
    loss_name: str
    objective: Any

    def __init__(self, student: str | None) -> None:
        self.student = student
        self._forward: DistillingForward | None = None
        self._step: Any = None  # stands in the place of the module's own
        self._zero3: Any = None  # transformers asks whether this object is alive
        self._checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, the module, the vocabularies and the licenses, before teachers are loaded."""
        self._zero3 = prepare_for_zero3(trainer)
        self._checked = False
        if stage != "fit":
            return
        require_supported(trainer)
        require_resumable_ranks(trainer)
        require_returned_loss(pl_module)
        if not builds_later(pl_module):
            student: PreTrainedModel | str = find_student(pl_module, self.student)
            self._refuse(pl_module, student)
        elif hasattr(pl_module, "student_reference"):
            student = pl_module.student_reference
        else:
            return
        require_launchable(trainer, student)
        self._check(trainer, pl_module, student)

    def _refuse(self, module: LightningModule, student: PreTrainedModel | str) -> None:
        """Refuse a student that this callback's loss would train otherwise than its module means."""
        refuse_prompt_learning(student if isinstance(student, str) else as_trained(module, student))
        if self.objective.ce_weight == 0.0:
            refuse_router_loss(
                config_of(student), "The module's own loss has it, and ce_weight=0 leaves that out: set ce_weight."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss where it is read anyway; reading it at each step would make the device wait."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            require_finite(outputs["loss"], self.loss_name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._step is not None:
            self._step.remove()
        if self._forward is not None:
            self._forward.remove()
        self._step = self._forward = self._zero3 = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.teardown(trainer, pl_module, "fit")

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate and compare vocabularies; neither needs any weights."""
        raise NotImplementedError
