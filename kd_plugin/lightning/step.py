"""A module's ``training_step`` with the distillation loss added to what it returns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from kd_plugin.cache.joining import mean_over_taught
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lightning.student import loss_of, shards_the_student
from kd_plugin.lightning.upstream import divide_once
from kd_plugin.lightning.windows import window_size
from kd_plugin.student.forward import Call, DistillingForward, beside

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


class DistillingStep:
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
        self.trainer = trainer
        self.module = module
        self.forward = forward
        self._prepare = prepare
        self._report = report
        self._inner = module.training_step
        self._had_own = "training_step" in module.__dict__
        self._divide_twice = divide_once(trainer)
        self._joint = True
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
        """Run the module's step on ``batch`` and return its output with the loss that is trained on."""
        prepared = self._prepare(batch)
        weight = self.forward.objective.ce_weight
        normaliser = self._normaliser(prepared)
        if prepared.taught is not None:
            taught = self._share(prepared.taught, window_tokens=None)
            mean_over_taught([prepared.target], float(normaliser), float(taught))
        call, output, own = self._run(prepared, rest, normaliser)
        formed = call.own is not None
        if formed and weight != 0.0 and not call.is_own(own):
            # The step does more with its loss than to return it: from now on it gets one with a graph of its own
            self._joint = formed = False
            call, output, own = self._run(prepared, rest, normaliser)
        assert call.trained is not None
        total = call.trained.to(normaliser.dtype)
        nothing = isinstance(prepared.tokens, int) and prepared.tokens == 0  # the mean over no labels is no number
        if not formed and weight != 0.0 and not nothing:
            total = total + weight * own
        elif isinstance(own, Tensor) and own.requires_grad and (formed or shards_the_student(self.trainer)):
            # A wrapper that passes on nothing but the loss gathers for the backward pass by that
            total = beside(total, own)
        self._report(call, total)
        return _with_loss(output, total)

    def _run(self, prepared: Prepared, rest: Any, normaliser: Tensor) -> tuple[Call, Any, Any]:
        """Return the call, what the module's step returned, and the loss in it."""
        call = Call(prepared.target, prepared.labels, prepared.shape, self._joint, normaliser)
        with self.forward.step(call):
            output = self._inner(prepared.batch, *rest)
        if call.found is None:
            raise ConfigError(
                f"{type(self.module).__name__}.training_step did not run the student over the batch's input_ids of "
                f"shape {call.shape}, so there is nothing to compare with the teacher. Pass the batch's input_ids to "
                "the student as they are."
            )
        return call, output, loss_of(output, self.module)

    def _normaliser(self, prepared: Prepared) -> Tensor:
        """Return the divisor of this rank's sum; Lightning averages over ranks and over the accumulation window."""
        total = self._share(prepared.tokens, prepared.window_tokens)
        if self.trainer.world_size > 1:
            return total.clamp(min=1e-9)
        return total.clamp(min=1.0 / self.trainer.accumulate_grad_batches)

    def _share(self, tokens: int | Tensor, window_tokens: float | Tensor | None) -> Tensor:
        """Return a rank's share of a number of tokens over all ranks and the accumulation window."""
        window, trainer = window_tokens, self.trainer
        total = torch.zeros((), device=self.module.device) + (tokens if window is None else window)
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


def _with_loss(output: Any, total: Tensor) -> Any:
    if not hasattr(output, "get"):
        return total
    replaced = dict(output)
    replaced["loss"] = total
    return replaced
