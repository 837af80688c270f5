"""GPU hours and money for a whole training set: offline KD against the panel, own GPUs against a metered API."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kd_plugin.zero.architectures import Architecture
from kd_plugin.zero.cluster import Cluster
from kd_plugin.zero.run import PlannedRun
from kd_plugin.zero.time import generation_seconds, score_flops, train_flops


@dataclass(frozen=True)
class Bill:
    """What a method takes for the whole training set.

    Attributes:
        method: ``offline`` or ``panel``.
        teacher_flops: of the teachers' passes over the text.
        student_flops: of the student's training.
        teacher_hours: GPU hours of the teachers.
        student_hours: GPU hours of training the student, its own generation included.
        price: of all GPU hours.
    """

    method: str
    teacher_flops: float
    student_flops: float
    teacher_hours: float
    student_hours: float
    price: float

    @property
    def hours(self) -> float:
        """All GPU hours."""
        return self.teacher_hours + self.student_hours


@dataclass(frozen=True)
class BreakEven:
    """Own GPUs against an API that writes the same text.

    Attributes:
        own_per_million: price of a million completion tokens written on own GPUs.
        api_per_million: price of the same from the API, its prompts included.
        tokens: millions of completion tokens from which own GPUs are cheaper, given what their start takes; None
            where they never are.
    """

    own_per_million: float
    api_per_million: float
    tokens: float | None


def bills(run: PlannedRun, cluster: Cluster, rows: int, epochs: float) -> tuple[Bill, Bill]:
    """Return the bills of offline KD and of the panel, over ``rows`` prompts seen ``epochs`` times.

    Offline: each teacher writes and scores each row once, then the student trains for all epochs. Panel: in each
    epoch the student writes, the teachers score what it wrote, and it trains.
    """
    speed = cluster.tflops * 1e12 * cluster.utilization
    tokens = rows * (run.prompt_length + run.completion_length)
    training = train_flops(run, tokens * epochs)
    scoring = score_flops(run, tokens)
    written = sum(_writing_hours(run, teacher.shape, cluster, rows) for teacher in run.teachers if teacher.shape)
    if run.teachers and not run.judged_by_all:
        written /= len(run.teachers)
    student_writes = _writing_hours(run, run.student, cluster, rows) * epochs
    hour = speed * 3600
    found = []
    for method, teacher_flops, teacher_hours, extra in (
        ("offline", scoring, scoring / hour + written, 0.0),
        ("panel", scoring * epochs, scoring * epochs / hour, student_writes),
    ):
        student_hours = training / hour + extra
        price = (teacher_hours + student_hours) * cluster.price
        found.append(Bill(method, teacher_flops, training, teacher_hours, student_hours, price))
    return found[0], found[1]


def break_even(
    run: PlannedRun, cluster: Cluster, *, input_price: float, output_price: float, start_hours: float = 1.0
) -> BreakEven | None:
    """Compare the panel's first own teacher with an API.

    Args:
        run: the run; a teacher with a known shape is needed.
        cluster: the machines.
        input_price: of a million prompt tokens.
        output_price: of a million completion tokens.
        start_hours: hours in which the whole cluster loads models and does nothing else.

    Returns:
        None where no teacher has a shape.
    """
    shape = next((t.shape for t in run.teachers if t.shape is not None), None)
    if shape is None:
        return None
    rows = 1_000_000 / run.completion_length
    own = _writing_hours(run, shape, cluster, rows) * cluster.price
    api = output_price + input_price * run.prompt_length / run.completion_length
    start = start_hours * cluster.ranks * cluster.price
    return BreakEven(own, api, start / (api - own) if api > own else None)


def _writing_hours(run: PlannedRun, shape: Architecture, cluster: Cluster, rows: float) -> float:
    """Return the GPU hours in which a model writes ``rows`` completions.

    Spread over k GPUs it reads its weights k times as fast, so that the GPU hours do not depend on k.
    """
    return rows / run.rows_generated * generation_seconds(replace(run, student=shape), cluster) / 3600
