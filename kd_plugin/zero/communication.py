"""Bytes that one rank sends in an optimizer step.

Rings send (N - 1)/N of a tensor for an all-gather or a reduce-scatter, twice that for an all-reduce. Symbols as in
``memory``: P parameters, T trainable, N ranks, b bytes of a weight, A micro-batches in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    Stages 0 and 1 reduce once a step, 2 and 3 once a micro-batch. Stage 3 gathers the weights for the forward and
    for the backward pass of each micro-batch; layers that are smaller than the persistence threshold stay whole and
    are gathered once a step, after the update.
    """
    ring = (ranks - 1) / ranks
    student, size, steps = run.student, run.element, run.accumulation
    trained = ring * size * student.trainable
    teachers = _teachers(run, ring)
    if stage == 0:
        return Traffic(2 * trained, 0.0, 0.0, teachers)
    if stage in (1, 2):
        return Traffic(trained * (1 if stage == 1 else steps), trained, 0.0, teachers)
    threshold = persistence_threshold(student.hidden)
    cut = ring * size * sum(p.numel for p in student.parameters if p.numel >= threshold)
    kept = ring * size * sum(p.numel for p in student.parameters if p.numel < threshold and p.trainable)
    passes = 1 if run.gather_for_generation else run.completion_length
    writes = cut * passes if run.method == "panel" else 0.0
    return Traffic(trained * steps, 2 * cut * steps + kept, writes, teachers)


def _teachers(run: PlannedRun, ring: float) -> float:
    """Sharded teachers: their body for each pass of scoring, their head for each loss.

    Every rank joins every teacher's passes, so a routed panel gathers as often as its busiest rank needs.
    """
    if run.method == "offline":
        return 0.0
    total = 0.0
    for teacher in run.placed("sharded"):
        assert teacher.shape is not None
        body = teacher.shape.total - teacher.shape.head_numel
        total += ring * run.element * run.accumulation * (body + teacher.shape.head_numel)
    return total
