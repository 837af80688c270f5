"""Counts what a rank of a real run holds and sends: tensors that DeepSpeed keeps, the loss's buffers, collectives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed

COUNTED_STEP = 2


def held(tensors: Iterable[Any], seen: set[int]) -> int:
    """Return the bytes of the memory behind ``tensors``; what is in ``seen`` is counted already."""
    total = 0
    for tensor in tensors:
        if tensor is None or not tensor.numel():
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


class Held:
    """Weights, gradients and optimizer states of the engine that trains, when its optimizer steps the second time.

    Gradients are counted twice: when backward is through and DeepSpeed has yet to reduce what is left (their peak),
    and when the optimizer begins its step.
    """

    def __init__(self, engine: Any, on_step: Callable[[int], None]) -> None:
        self.engine, self.steps, self.found, self.peak = engine, 0, {}, 0
        zero = engine.optimizer
        step, reduce = zero.step, zero.independent_gradient_partition_epilogue

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            if self.steps == COUNTED_STEP:
                self.found = self.count()
            result = step(*args, **kwargs)
            on_step(self.steps)
            return result

        def counted_reduce(*args: Any, **kwargs: Any) -> Any:
            self.peak = max(self.peak, held(self._gradients(), set()))
            return reduce(*args, **kwargs)

        zero.step, zero.independent_gradient_partition_epilogue = counted_step, counted_reduce

    def _gradients(self) -> list[Any]:
        zero = self.engine.optimizer
        found = [parameter.grad for parameter in self.engine.module.parameters()]
        for kept in ("averaged_gradients", "all_grad_tensors"):
            found += [g for group in getattr(zero, kept, {}).values() for g in group or []]
        return [*found, getattr(zero, "grad_partitions_flat_buffer", None)]

    def count(self) -> dict[str, int]:
        seen: set[int] = set()
        zero, parameters = self.engine.optimizer, list(self.engine.module.parameters())
        weights = held((t for p in parameters for t in (getattr(p, "ds_tensor", None), p.data)), seen)
        gradients = held(self._gradients(), seen)
        master = [*getattr(zero, "single_partition_of_fp32_groups", [])]
        master += [*getattr(zero, "fp32_partitioned_groups_flat", [])]
        states = [v for s in zero.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
        return {"weights": weights, "gradients": gradients, "optimizer": held([*master, *states], seen)}


class LossBytes:
    """The largest fused loss: its buffers, the gradients it forms, heads made whole for it; and what waits for it."""

    def __init__(self, trainer: Any) -> None:
        from kd_plugin.divergence import fused, projection

        self.loss, self.hidden, self._workspaces = 0, 0, []
        made, walk = projection.Workspace.__init__, fused.panel_pass
        score = trainer._generate_and_score_completions

        def noted(workspace: Any, *args: Any) -> None:
            made(workspace, *args)
            self._workspaces.append(workspace)

        def counted(hidden: Any, weight: Any, bias: Any, student: Any, plan: Any) -> Any:
            self._workspaces.clear()
            found = walk(hidden, weight, bias, student, plan)
            buffers = [b for w in self._workspaces for b in w._buffers.values()]
            heads = [weight, *(term.signal.head.weight for group in plan.groups for term in group.terms)]
            whole = [head.data for head in heads if hasattr(head, "ds_tensor")]
            self.loss = max(self.loss, held([*buffers, *found.gradients, *whole], set()))
            return found

        def scored(inputs: Any) -> Any:
            output = score(inputs)
            signals = [s for c in output["scored"].scores for s in c.signals.values()]
            self.hidden = max(self.hidden, sum(s.hidden.numel() * s.hidden.element_size() for s in signals))
            return output

        projection.Workspace.__init__, fused.panel_pass = noted, counted
        trainer._generate_and_score_completions = scored


class Sent:
    """Bytes that this rank sends if collectives run as rings, by what they are for.

    Every collective of ``torch.distributed`` counts with the bytes of its whole tensor; a ring of N ranks sends
    (N - 1)/N of them for a gather or a reduce-scatter, twice that for an all-reduce, all of them for a reduce to one
    rank (but on that rank). Integers, which carry counts and masks, and tensors of a few numbers, which carry
    metrics, are left out.
    """

    def __init__(self) -> None:
        self.cause, self.total, self.steps = "training", Counter(), {}
        ranks = int(os.environ["WORLD_SIZE"])  # DeepSpeed takes the functions that are there when it starts
        ring = (ranks - 1) / ranks
        whole, joined = (lambda a: a[0]), (lambda a: a[1])
        for name, factor, tensor in (
            ("all_reduce", 2 * ring, whole),
            ("reduce", ring, whole),
            ("all_gather_into_tensor", ring, whole),
            ("_all_gather_base", ring, whole),
            ("reduce_scatter_tensor", ring, joined),
            ("_reduce_scatter_base", ring, joined),
            ("all_gather", ring, whole),
            ("reduce_scatter", ring, joined),
            ("broadcast", 1.0, whole),
        ):
            self._wrap(name, factor, tensor)

    def _wrap(self, name: str, factor: float, which: Callable[[Any], Any]) -> None:
        call = getattr(torch.distributed, name)

        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = which(args) if len(args) > 1 else which([*args, *kwargs.values()])
            tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            numbers = [t for t in tensors if t.is_floating_point() and t.numel() > 16]
            kind = "reduce" if "reduce" in name else "gather"
            self.total[f"{self.cause} {kind}"] += factor * sum(t.numel() * t.element_size() for t in numbers)
            return call(*args, **kwargs)

        for home in (torch.distributed, torch.distributed.distributed_c10d):
            setattr(home, name, counted)

    def during(self, owner: Any, name: str, cause: str) -> None:
        """Book what is sent while ``owner.name`` runs to ``cause``."""
        call = getattr(owner, name)

        @wraps(call)
        def booked(*args: Any, **kwargs: Any) -> Any:
            before, self.cause = self.cause, cause
            try:
                return call(*args, **kwargs)
            finally:
                self.cause = before

        setattr(owner, name, booked)

    def entering(self, opened: Callable[..., Any], cause: str) -> Callable[..., Any]:
        """Book what is sent while a context of ``opened`` is entered to ``cause``."""

        @contextmanager
        def booked(*args: Any) -> Iterator[Any]:
            context = opened(*args)
            before, self.cause = self.cause, cause
            try:
                found = context.__enter__()
            finally:
                self.cause = before
            try:
                yield found
            finally:
                context.__exit__(None, None, None)

        return booked

    def end_step(self, step: int) -> None:
        """Keep what was sent until the end of ``step``."""
        self.steps[step] = dict(self.total)

    def of_step(self, step: int) -> dict[str, float]:
        """Return what was sent in one step, by cause."""
        before = self.steps.get(step - 1, {})
        return {cause: size - before.get(cause, 0.0) for cause, size in self.steps[step].items()}


class Counting:
    """All three of a panel's run; made before the trainer, attached to it before it trains."""

    def __init__(self) -> None:
        self.sent = Sent()

    def attach(self, trainer: Any) -> None:
        from kd_plugin.panel import step
        from kd_plugin.trainers.panel_host import TrainerHost

        self.bytes, self.held = LossBytes(trainer), None
        self.sent.during(step, "score_rows", "teachers")
        self.sent.during(trainer, "_generate", "generation")
        self.sent.during(TrainerHost, "sum_over_ranks", "metrics")
        step.gathered_heads = self.sent.entering(step.gathered_heads, "teachers")
        prepare = trainer.accelerator.prepare

        def prepared(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            engine = result[0] if isinstance(result, tuple) else result
            if self.held is None and hasattr(engine, "optimizer"):
                self.held = Held(engine, self.sent.end_step)
            return result

        trainer.accelerator.prepare = prepared
        self.trainer = trainer

    def report(self) -> dict[str, Any]:
        teachers = [t.model for t in self.trainer.panel.teachers.values()]
        parts = (p for model in teachers for p in model.parameters())
        return {
            **self.held.found,
            "gradients_peak": self.held.peak,
            "teachers": held((t for p in parts for t in (getattr(p, "ds_tensor", None), p.data)), set()),
            "loss": self.bytes.loss,
            "hidden": self.bytes.hidden,
            "sent": self.sent.of_step(COUNTED_STEP + 1),
        }
