"""Bytes that one rank sends in an optimizer step.

Rings send (N - 1)/N of a tensor for an all-gather or a reduce-scatter, twice that for an all-reduce. Symbols as in
``memory``: P parameters, T trainable, N ranks, b bytes of a weight, A micro-batches in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_plugin.planner.architectures import Architecture
from kd_plugin.planner.memory import persistence_threshold
from kd_plugin.planner.run import PlannedRun


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

    Stage 3 gathers, for each micro-batch, the layers for the forward and again for the backward pass, the embedding
    once, and the head for the loss; an untied head also at both ends of the model's own pass, because DeepSpeed saw
    it touched there. Together every parameter twice. Recomputed activations cost nothing more, because a layer that
    is needed again at once is kept. Parameters of up to the persistence threshold stay whole and are gathered once a
    step, after the update.
    """
    ring = (ranks - 1) / ranks
    student, size, steps = run.student, run.element, run.accumulation
    trained = ring * size * student.trainable
    scored = [_scored(run, t.shape, ranks) for t in run.placed("sharded") if t.shape is not None]
    teachers = size * steps * sum(scored) if run.method == "panel" else 0.0
    if stage == 0:
        return Traffic(2 * trained, 0.0, 0.0, teachers)
    if stage in (1, 2):
        return Traffic(trained * (1 if stage == 1 else steps), trained, 0.0, teachers)
    cut, kept = _gathered(run, student, ranks)
    tokens = 1 if run.gather_for_generation else run.completion_length
    return Traffic(
        size * steps * sum((ranks - 1) * -(-p.numel // ranks) for p in student.parameters if p.trainable),
        size * (2 * cut * steps + kept),
        size * cut * tokens if run.method == "panel" else 0.0,
        teachers,
    )


def _gathered(run: PlannedRun, shape: Architecture, ranks: int) -> tuple[int, int]:
    """Return the elements that a rank sends to gather all that ZeRO-3 cuts, and all that stays whole.

    Each rank sends its part of a parameter, which is rounded up, N - 1 times.
    """
    threshold, sent = persistence_threshold(run.student.hidden), [0, 0]
    for parameter in shape.parameters:
        sent[parameter.numel <= threshold] += (ranks - 1) * -(-parameter.numel // ranks)
    return sent[0], sent[1]


def _scored(run: PlannedRun, shape: Architecture, ranks: int) -> float:
    """Return the elements sent to gather a sharded teacher: its body to score, its head for the loss.

    Every rank joins every teacher's passes, so a routed panel gathers as often as its busiest rank needs: up to once
    a micro-batch, which is what is counted.
    """
    cut, _ = _gathered(run, shape, ranks)
    return cut + (shape.head_numel * (ranks - 1) / ranks if shape.tied else 0.0)
