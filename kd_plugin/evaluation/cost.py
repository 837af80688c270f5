"""What a training has cost so far: forward and backward passes of the student and of the teachers here, and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

_MULTIPLY_ADD = 2  # floating-point operations of one weight at one token


@dataclass(frozen=True)
class Cost:
    """What something has taken.

    Attributes:
        student_flops: of the student's passes: to generate, forward, backward.
        teacher_flops: of the passes of teachers in these processes; a server's are its own.
        seconds: by the clock, evaluations left out.
        money: paid to servers, by the prices that their teachers have.
    """

    student_flops: float = 0.0
    teacher_flops: float = 0.0
    seconds: float = 0.0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def times(self, factor: float) -> Cost:
        """Return so many times as much."""
        return Cost(*(getattr(self, f.name) * factor for f in fields(Cost)))

    def less(self, other: Cost) -> Cost:
        """Return what is more than ``other``."""
        return self + other.times(-1.0)

    @property
    def flops(self) -> float:
        """Student's and teachers' together."""
        return self.student_flops + self.teacher_flops


class CostMeter:
    """Counts the tokens that models read in forward passes, padding included, and what that costs.

    A token costs two operations a weight that multiplies it, twice as many more where a gradient flows to all weights,
    and once as many more where activations are computed again. The embedding counts where it is the output head too.
    Attention over the context and element-wise operations are left out: a few percent at the usual lengths.
    """

    def __init__(self) -> None:
        self._flops = {"student": 0.0, "teacher": 0.0}
        self._began = time.perf_counter()
        self._paused = False
        self._waited = 0.0
        self._hooks: list[Any] = []

    def attach(self, student: Any, teachers: Mapping[str, Any]) -> None:
        """Count from now on, from 0.

        Args:
            student: a transformers model, PEFT-wrapped or not.
            teachers: by name the models that are in this process.
        """
        self.detach()
        self._flops = {"student": 0.0, "teacher": 0.0}
        self._began, self._waited = time.perf_counter(), 0.0
        seen: set[int] = set()
        for kind, model in [("student", student), *(("teacher", one) for one in teachers.values())]:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            backbone = getattr(base, "base_model", base)
            if id(backbone) not in seen:  # adapters of one base, or the student as its own teacher
                seen.add(id(backbone))
                self._hooks.append(self._follow(kind, base, backbone))

    def detach(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside the block out."""
        began, self._paused = time.perf_counter(), True
        try:
            yield
        finally:
            self._paused = False
            self._waited += time.perf_counter() - began

    def read(self) -> Cost:
        """Return what this process has taken since :meth:`attach`."""
        seconds = time.perf_counter() - self._began - self._waited
        return Cost(self._flops["student"], self._flops["teacher"], seconds)

    def _follow(self, kind: str, model: nn.Module, backbone: nn.Module) -> Any:
        forward, backward = operations(model)

        def count(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            if self._paused:
                return
            ids, embedded = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
            tokens = 0 if ids is None else ids.numel()
            if ids is None and embedded is not None:
                tokens = embedded.shape[0] * embedded.shape[1]
            trains = torch.is_grad_enabled() and module.training
            again = trains and getattr(model, "is_gradient_checkpointing", False)
            self._flops[kind] += tokens * (forward * (2 if again else 1) + (backward if trains else 0.0))

        return backbone.register_forward_pre_hook(count, with_kwargs=True)


def operations(model: nn.Module) -> tuple[float, float]:
    """Return the floating-point operations of a token in a forward pass of ``model``, and in a backward pass."""
    embeddings, heads = (getattr(model, f"get_{one}_embeddings", None) for one in ("input", "output"))
    embedding: Any = embeddings() if callable(embeddings) else None
    head: Any = heads() if callable(heads) else None
    apart = embedding is not None and head is not None and embedding.weight is not head.weight
    left_out = {id(embedding.weight)} if apart else set()
    weights = [p for p in model.parameters() if id(p) not in left_out]
    total = sum(_numel(p) for p in weights)
    trained = sum(_numel(p) for p in weights if p.requires_grad)
    # A backward pass forms the gradient of every activation, and of the weights that are trained
    return float(_MULTIPLY_ADD * total), float(_MULTIPLY_ADD * (total + trained))


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor
