"""Bytes that one rank sends in an optimizer step.

Rings send (N - 1)/N of a tensor for an all-gather or a reduce-scatter, twice that for an all-reduce. Symbols as in
``memory``: P parameters, T trainable, N ranks, b bytes of a weight, A micro-batches in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_plugin.zero.architectures import Architecture
from kd_plugin.zero.memory import persistence_threshold
from kd_plugin.zero.run import PlannedRun


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step.

    Attributes:
        gradients: reducing them.
        weights: gathering the student for training, or its updated parts.
        generation: gathering the student to write completions.
        teachers: gathering sharded teachers to score, and their heads for the loss.
    """

    gradients: float
    weights: float
    generation: float
    teachers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights + self.generation + self.teachers


def traffic(run: PlannedRun, stage: int, ranks: int) -> Traffic:
    """Compute what each of ``ranks`` ranks sends in a step.

    Stages 0 and 1 reduce once a step, 2 and 3 once a micro-batch. Stages 1 and 2 reduce each bucket to the rank that
    owns it, which ``use_multi_rank_bucket_allreduce=False`` asks for (see ``writers``); DeepSpeed's default sends
    every bucket to all, twice as much.

    Stage 3 gathers, for each micro-batch, every parameter for the forward pass, the head again for the loss where it
    is the embedding, and the layers again for the backward pass; recomputed activations cost nothing more, because a
    layer that is needed again at once is kept. Parameters of up to the persistence threshold stay whole and are
    gathered once a step, after the update.
    """
    ring = (ranks - 1) / ranks
    student, size, steps = run.student, run.element, run.accumulation
    trained = ring * size * student.trainable
    teachers = ring * size * steps * sum(_scored(run, t.shape) for t in run.placed("sharded") if t.shape is not None)
    if run.method == "offline":
        teachers = 0.0
    if stage == 0:
        return Traffic(2 * trained, 0.0, 0.0, teachers)
    if stage in (1, 2):
        return Traffic(trained * (1 if stage == 1 else steps), trained, 0.0, teachers)
    cut = _cut_elements(run, student)
    passes = 2 * cut if student.tied else 2 * (cut - student.head_numel)
    tokens = 1 if run.gather_for_generation else run.completion_length
    writes = cut * tokens if run.method == "panel" else 0
    return Traffic(
        trained * steps,
        ring * size * (passes * steps + student.total - cut),
        ring * size * writes,
        teachers,
    )


def _cut_elements(run: PlannedRun, shape: Architecture) -> int:
    """Return the elements of parameters that ZeRO-3 does not keep whole."""
    return sum(p.numel for p in shape.parameters if p.numel > persistence_threshold(run.student.hidden))


def _scored(run: PlannedRun, shape: Architecture) -> int:
    """Return the elements gathered of a sharded teacher: its body to score, its head for the loss.

    Every rank joins every teacher's passes, so a routed panel gathers as often as its busiest rank needs: up to once
    a micro-batch, which is what is counted.
    """
    return _cut_elements(run, shape) + (shape.head_numel if shape.tied else 0)
