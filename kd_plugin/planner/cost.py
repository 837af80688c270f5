"""GPU hours and money for a whole training set: offline KD against the panel, own GPUs against a metered API."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kd_plugin.planner.architectures import Architecture
from kd_plugin.planner.cluster import Cluster
from kd_plugin.planner.communication import traffic
from kd_plugin.planner.fitting import Option, options, recommended
from kd_plugin.planner.run import Method, PlannedRun
from kd_plugin.planner.time import generation_seconds, score_flops, train_flops


@dataclass(frozen=True)
class Bill:
    """What a method takes for the whole training set, under the layout that is recommended for it.

    Attributes:
        method: ``offline`` or ``panel``.
        layout: name of that layout.
        teacher_flops: of the teachers' passes over the text; servers not counted.
        student_flops: of the student's training, with activations computed again, whatever the layout.
        teacher_hours: GPU hours of the teachers. Panel: the part of each step in which they score. Offline: the
            capture, before training.
        student_hours: GPU hours of the rest of all steps.
        price: of all GPU hours.
        steps: optimizer steps, not rounded.
        step_seconds: of a step under ``layout``.
        gpus: that a step keeps busy.
        tokens: that all steps train on, prompts included.
    """

    method: str
    layout: str
    teacher_flops: float
    student_flops: float
    teacher_hours: float
    student_hours: float
    price: float
    steps: float
    step_seconds: float
    gpus: int
    tokens: float

    @property
    def hours(self) -> float:
        """All GPU hours: of a panel its steps times their time times its GPUs; of offline KD the capture's too."""
        return self.teacher_hours + self.student_hours

    @property
    def tokens_per_second(self) -> float:
        """Tokens that training goes through in a second, on all GPUs together."""
        return self.tokens / (self.steps * self.step_seconds)


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


def bills(run: PlannedRun, cluster: Cluster, rows: int, epochs: float) -> list[Bill]:
    """Return the bills of offline KD and of the panel, over ``rows`` prompts seen ``epochs`` times.

    Offline: each teacher writes and scores each row once, then the student trains for all epochs. Panel: in each
    epoch the student writes, the teachers score what it wrote, and it trains. What training takes is the number of its
    steps times the time of one under the layout that is recommended for the method, so that the bill and the plan's
    table cannot disagree.

    Returns:
        Offline first; a method of which no layout fits has no bill, nor has a panel without teachers.
    """
    methods: tuple[Method, ...] = ("offline", "panel") if run.teachers else ("offline",)
    planned = [(method, recommended(options(replace(run, method=method), cluster))) for method in methods]
    return [_bill(option, cluster, rows, epochs) for _, option in planned if option is not None]


def _bill(option: Option, cluster: Cluster, rows: int, epochs: float) -> Bill:
    run, seconds = option.run, option.seconds
    steps = rows * epochs / (run.rows_generated * cluster.ranks)
    tokens = rows * epochs * (run.prompt_length + run.completion_length)
    hours_of_a_second = steps * cluster.ranks / 3600
    if run.method == "panel":
        scoring = score_flops(run, tokens)
        sent = traffic(run, option.layout.stage, cluster.ranks)
        teachers = (seconds.score + sent.teachers / cluster.link) * hours_of_a_second
        student = seconds.total * hours_of_a_second - teachers
    else:
        scoring = score_flops(run, rows * (run.prompt_length + run.completion_length))
        teachers = _capture_hours(run, cluster, rows, scoring)
        student = seconds.total * hours_of_a_second
    return Bill(
        method=run.method,
        layout=option.layout.name,
        teacher_flops=scoring,
        student_flops=train_flops(run, tokens),
        teacher_hours=teachers,
        student_hours=student,
        price=(teachers + student) * cluster.price,
        steps=steps,
        step_seconds=seconds.total,
        gpus=cluster.ranks,
        tokens=tokens,
    )


def _capture_hours(run: PlannedRun, cluster: Cluster, rows: int, scoring: float) -> float:
    """Return the GPU hours in which the teachers write and score ``rows`` rows once, ``scoring`` FLOPs of it."""
    written = sum(_writing_hours(run, teacher.shape, cluster, rows) for teacher in run.teachers if teacher.shape)
    if run.teachers and not run.judged_by_all:
        written /= len(run.teachers)
    return scoring / (cluster.tflops * 1e12 * cluster.utilization * 3600) + written


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
