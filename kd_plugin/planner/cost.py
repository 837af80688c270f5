"""Which ZeRO stage and offload fits, which of those is fastest, and what the whole training set then costs.

Costs are GPU hours and money: offline KD against the panel, own GPUs against a metered API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import Architecture
from kd_plugin.planner.memory import Layout, Memory, memory
from kd_plugin.planner.run import Cluster, Method, PlannedRun
from kd_plugin.planner.time import StepTime, generation_seconds, score_flops, step_time, traffic, train_flops
from kd_plugin.text.prompts import Templates
from kd_plugin.text.spending import Prices
from kd_plugin.text.writers import Usage

_CHARACTERS, _VERDICT = 4, 30  # characters of a token; tokens of a verdict, or of the lines around a correction
_OFFLOADS = {
    1: (("none", "none"), ("cpu", "none")),
    2: (("none", "none"), ("cpu", "none")),
    3: (("none", "none"), ("cpu", "none"), ("cpu", "cpu"), ("nvme", "nvme")),
}
LAYOUTS = tuple(
    Layout(stage, *offload, checkpointing=checkpointing)
    for stage in (0, 1, 2, 3)
    for offload in _OFFLOADS.get(stage, (("none", "none"),))
    for checkpointing in (False, True)
)


@dataclass(frozen=True)
class Option:
    """One layout with what it takes.

    Attributes:
        layout: stage, offload and checkpointing.
        run: the run, with generation gathered or not.
        memory: bytes on a GPU.
        seconds: estimated time of an optimizer step.
        verdict: empty where it fits, else what does not.
    """

    layout: Layout
    run: PlannedRun
    memory: Memory
    seconds: StepTime
    verdict: str

    @property
    def fits(self) -> bool:
        """Whether everything is within what the machines have."""
        return not self.verdict


def options(run: PlannedRun, cluster: Cluster, layouts: Sequence[Layout] = LAYOUTS) -> list[Option]:
    """Estimate every layout.

    Where gathered weights do not fit under ZeRO-3, generation falls back to layers that are gathered one by one.

    Returns:
        One option a layout, in the order of ``layouts``.
    """
    return [_weighed(run, layout, cluster) for layout in layouts]


def recommended(found: Sequence[Option]) -> Option | None:
    """Return the fastest option that fits; among equals the lowest stage, which has the fewest moving parts."""
    return min((o for o in found if o.fits), key=lambda o: (round(o.seconds.total, 3), o.layout.stage), default=None)


def require_possible(run: PlannedRun, layout: Layout) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: offloaded weights below stage 3, an adapter teacher on a base that is trained.
    """
    if layout.stage not in (0, 1, 2, 3):
        raise ConfigError(f"There is no ZeRO stage {layout.stage}; expected 0, 1, 2 or 3.")
    if layout.offload_parameters != "none" and layout.stage != 3:
        raise ConfigError(
            f"offload_parameters is {layout.offload_parameters!r} with ZeRO-{layout.stage}, which keeps all weights "
            "on each GPU. Weights are offloaded under stage 3 only; offload the optimizer, or choose stage 3."
        )
    if layout.offload_optimizer != "none" and layout.stage == 0:
        raise ConfigError(
            "offload_optimizer needs ZeRO-1, 2 or 3; stage 0 has nothing sharded that could be moved away."
        )
    if run.placed("adapter") and run.student.total == run.student.trainable:
        raise ConfigError(
            "An adapter teacher sits on the student's frozen base, but the full student is trained and its base "
            "moves. Train LoRA (lora_rank), or give the teacher a base of its own (sharded, resident or offload)."
        )


def _weighed(run: PlannedRun, layout: Layout, cluster: Cluster) -> Option:
    require_possible(run, layout)
    held = memory(run, layout, cluster.ranks)
    if layout.stage == 3 and run.method == "panel" and held.writing > cluster.usable:
        run = replace(run, gather_for_generation=False)
        held = memory(run, layout, cluster.ranks)
    return Option(layout, run, held, step_time(run, layout, held, cluster), _verdict(held, layout, cluster))


def _verdict(held: Memory, layout: Layout, cluster: Cluster) -> str:
    gib = 1024**3
    if held.peak > cluster.usable:
        what = "training" if held.training >= held.peak else "generation"
        return f"{what} needs {held.peak / gib:.1f} GiB, {cluster.usable / gib:.1f} can be used"
    share = (
        cluster.nvme_share if "nvme" in (layout.offload_optimizer, layout.offload_parameters) else cluster.host_share
    )
    if held.host > share:
        return f"offload needs {held.host / gib:.0f} GiB for each GPU beside it, there are {share / gib:.0f}"
    return ""


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
    """Own GPUs against an API that generates the same text.

    Attributes:
        own_per_million: price of a million completion tokens generated on own GPUs.
        api_per_million: price of the same from the API, its prompts included.
        tokens: millions of completion tokens from which own GPUs are cheaper, given what their start takes; None
            where they never are.
    """

    own_per_million: float
    api_per_million: float
    tokens: float | None


def bills(run: PlannedRun, cluster: Cluster, rows: int, epochs: float) -> list[Bill]:
    """Return the bills of offline KD and of the panel, over ``rows`` prompts seen ``epochs`` times.

    Offline: each teacher generates and scores each row once, then the student trains for all epochs. Panel: in each
    epoch the student generates, the teachers score its responses, and it trains. What training takes is the number of
    its steps times the time of one under the layout that is recommended for the method, so that the bill and the plan's
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
    """Return the GPU hours in which the teachers generate and score ``rows`` rows once, ``scoring`` FLOPs of it."""
    generating = sum(_generation_hours(run, teacher.shape, cluster, rows) for teacher in run.teachers if teacher.shape)
    if run.teachers and not run.scored_by_all:
        generating /= len(run.teachers)
    return scoring / (cluster.tflops * 1e12 * cluster.utilization * 3600) + generating


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
    own = _generation_hours(run, shape, cluster, rows) * cluster.price
    api = output_price + input_price * run.prompt_length / run.completion_length
    start = start_hours * cluster.ranks * cluster.price
    return BreakEven(own, api, start / (api - own) if api > own else None)


@dataclass(frozen=True)
class TextBill:
    """What a teacher that corrects by text reads and writes for the whole training set.

    Attributes:
        teacher: its name.
        read: tokens.
        written: tokens.
        price: of both, in the currency of the prices.
    """

    teacher: str
    read: float
    written: float
    price: float


def text_bills(
    prices: Mapping[str, Prices], run: PlannedRun, responses: float, *, corrected: float, voted: bool
) -> list[TextBill]:
    """Return what each text teacher of a panel reads and writes, all of them asked about every response.

    A teacher evaluates each response and corrects the share ``corrected``. Where the others vote, it also evaluates
    their corrections of that share. Templates are the package's own, at four characters a token.

    Args:
        prices: name to what its tokens cost.
        run: with the lengths of prompts and completions.
        responses: of the student, in all.
        corrected: share of them that falls short.
        voted: whether a majority of the other teachers accepts corrections.
    """
    templates = Templates.load()
    asked, rewriting = (
        (len(one.instructions) + len(one.request)) / _CHARACTERS + run.prompt_length + run.completion_length
        for one in (templates.evaluate, templates.rewrite)
    )
    evaluations = 1.0 + (corrected * (len(prices) - 1) if voted else 0.0)
    read = responses * (evaluations * asked + corrected * rewriting)
    written = responses * (evaluations * _VERDICT + corrected * (run.completion_length + _VERDICT))
    return [TextBill(name, read, written, own.cost(Usage(int(read), int(written)))) for name, own in prices.items()]


def _generation_hours(run: PlannedRun, shape: Architecture, cluster: Cluster, rows: float) -> float:
    """Return the GPU hours in which a model generates ``rows`` completions.

    Spread over k GPUs it reads its weights k times as fast, so that the GPU hours do not depend on k.
    """
    return rows / run.rows_generated * generation_seconds(replace(run, student=shape), cluster) / 3600
