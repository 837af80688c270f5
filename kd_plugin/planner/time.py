"""Estimated time and traffic of an optimizer step, by GPUs that do all of it, or with engines and servers beside them.

The time is floating-point work, generation, traffic and offload, one after the other. FLOPs follow Kaplan et al. (arXiv
2001.08361): 2 a parameter and token forward, 4 backward, 2 more where activations are computed again; LoRA needs no
weight gradients of the frozen part (2 of the 4). Nothing is assumed to overlap, so that the estimate ranks layouts with
care rather than promises a speed.

The traffic is the bytes that one rank sends: rings send (N - 1)/N of a tensor for an all-gather or a reduce-scatter,
twice that for an all-reduce. Symbols as in ``memory``: P parameters, T trainable, N ranks, b bytes of a weight, A
micro-batches in a step.

With engines and servers three sides work on one generation batch: engines generate it, servers score it, trainers learn
from it. With weights that may be a step behind, engines generate the next batch while the others are at this one. Rates
are stated, not measured: a GPU's as in ``Cluster``; of its memory's bandwidth decoding reaches a share; what a server
sends reaches a trainer's node over HTTP; weights go through a shared directory, written by one rank and read by every
engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import Architecture
from kd_plugin.planner.memory import Layout, Memory, persistence_threshold
from kd_plugin.planner.run import Cluster, PlannedRun

ENGINE_GPUS = 8  # GPUs that hold one copy of the student, by tensor parallelism
_DECODING = 0.5  # share of the memory's bandwidth that decoding reaches
_STATE = 2  # bytes of a value that a server sends


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step.

    Attributes:
        gradients: reducing them.
        weights: gathering the student for training, or its updated parts.
        generation: gathering the student to generate completions.
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
    is needed again at once is kept. Parameters of up to the persistence threshold stay gathered and are gathered once a
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
    sharded, kept = _gathered(run, student, ranks)
    tokens = 1 if run.gather_for_generation else run.completion_length
    return Traffic(
        size * steps * sum((ranks - 1) * -(-p.numel // ranks) for p in student.parameters if p.trainable),
        size * (2 * sharded * steps + kept),
        size * sharded * tokens if run.method == "panel" and run.generates else 0.0,
        teachers,
    )


def _gathered(run: PlannedRun, shape: Architecture, ranks: int) -> tuple[int, int]:
    """Return the elements that a rank sends to gather all that ZeRO-3 shards, and all that stays gathered.

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
    sharded, _ = _gathered(run, shape, ranks)
    return sharded + (shape.head_numel * (ranks - 1) / ranks if shape.tied else 0.0)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by cause."""

    train: float
    generate: float
    score: float
    communicate: float
    offload: float

    @property
    def total(self) -> float:
        """All of it, nothing overlapped."""
        return self.train + self.generate + self.score + self.communicate + self.offload

    @property
    def bound(self) -> str:
        """What takes the largest part."""
        parts = {n: getattr(self, n) for n in ("train", "generate", "score", "communicate", "offload")}
        return max(parts, key=lambda n: parts[n])


def train_flops(run: PlannedRun, tokens: float, checkpointing: bool = True) -> float:
    """Return the FLOPs of forward and backward over ``tokens`` of the student."""
    total, trainable = run.student.total, run.student.trainable
    return tokens * (4 * total + 2 * trainable + (2 * total if checkpointing else 0))


def score_flops(run: PlannedRun, tokens: float) -> float:
    """Return the FLOPs of the teachers' forward passes over ``tokens`` of the student's text; servers not counted."""
    sizes = [t.shape.total for t in run.teachers if t.shape is not None]
    sizes += [run.student.total] * len(run.placed("adapter"))
    if not sizes:
        return 0.0
    return 2 * tokens * (sum(sizes) if run.scored_by_all else sum(sizes) / len(sizes))


def step_time(run: PlannedRun, layout: Layout, held: Memory, cluster: Cluster) -> StepTime:
    """Estimate a step of ``run`` under ``layout``."""
    speed = cluster.tflops * 1e12 * cluster.utilization
    tokens = run.tokens_in_a_pass * run.accumulation
    panel = run.method == "panel"
    sent = traffic(run, layout.stage, cluster.ranks)
    moved = held.host * (3 if layout.offload_parameters != "none" else 1)
    rate = cluster.to_nvme / cluster.gpus_per_node if "nvme" in (layout.offload_optimizer,) else cluster.to_host
    return StepTime(
        train=train_flops(run, tokens, layout.checkpointing) / speed,
        generate=generation_seconds(run, cluster) if panel and run.generates else 0.0,
        score=score_flops(run, tokens) / speed if panel else 0.0,
        communicate=sent.total / cluster.link,
        offload=moved / rate,
    )


def generation_seconds(run: PlannedRun, cluster: Cluster) -> float:
    """Estimate writing a generation batch: each token reads all weights once and the rows' caches."""
    weights = run.element * run.student.total
    half = run.prompt_length + run.completion_length / 2
    cache = 2 * run.student.layers * run.student.kv_heads * run.student.head_dim * half * run.element
    return run.completion_length * (weights + cache * run.rows_generated) / cluster.memory_bandwidth


@dataclass(frozen=True)
class Engines:
    """GPUs beside those that train.

    Attributes:
        student_gpus: of engines that generate, in engines of 8.
        server_gpus: of the servers of teachers that score every row.
        active: parameters of a teacher that a token passes through; all of them but in a mixture of experts.
        width: of the teacher's hidden states, H.
        network: bytes a second that reach a trainer's node from servers.
        disk: bytes a second of the shared directory.
        staleness: optimizer steps that generation may be ahead.

    Raises:
        ConfigError: GPUs that make no whole engine, or servers without a teacher's size.
    """

    student_gpus: int
    server_gpus: int = 0
    active: float = 0.0
    width: int = 0
    network: float = 3e9
    disk: float = 2e9
    staleness: int = 1

    def __post_init__(self) -> None:
        if self.student_gpus < ENGINE_GPUS or self.student_gpus % ENGINE_GPUS:
            raise ConfigError(
                f"engine_gpus is {self.student_gpus}; an engine has {ENGINE_GPUS}, so expected a multiple."
            )
        if self.server_gpus and not (self.active > 0 and self.width > 0):
            raise ConfigError(
                "server_gpus is set: name the teacher's size with server_active (billions of parameters that a token "
                "passes through) and server_width (of its hidden states)."
            )


@dataclass(frozen=True)
class EngineStep:
    """Seconds of one optimizer step, by who spends them.

    Attributes:
        generate: engines, for the rows of all ranks.
        sync: the student's weights, or its adapter alone, from the trainers to the engines.
        score: servers.
        transfer: hidden states from servers to trainers.
        train: forward, backward, traffic and offload of the trainers.
        staleness: optimizer steps that generation may be ahead.
    """

    generate: float
    sync: float
    score: float
    transfer: float
    train: float
    staleness: int

    @property
    def learning(self) -> float:
        """Of the side that scores and trains, after a batch is there."""
        return self.score + self.transfer + self.train

    @property
    def writing(self) -> float:
        """Of the side that generates, weights included."""
        return self.sync + self.generate

    @property
    def total(self) -> float:
        """Of a step: both sides one after the other, or the slower one where they overlap, and the sync in any case."""
        if self.staleness == 0:
            return self.writing + self.learning
        return self.sync + max(self.generate, self.learning)


def engine_step(run: PlannedRun, seconds: StepTime, cluster: Cluster, engines: Engines) -> EngineStep:
    """Estimate a step.

    Args:
        run: of the trainers.
        seconds: of them, without generation.
        cluster: they train on.
        engines: the others.
    """
    rows = run.rows_generated * cluster.ranks
    tokens = rows * (run.prompt_length + run.completion_length)
    weights = run.element * run.student.total
    copies = engines.student_gpus // ENGINE_GPUS
    # Decoding reads all weights and the keys and values of its rows for each token, and multiplies by them
    half = run.prompt_length + run.completion_length / 2
    cached = 2 * run.student.layers * run.student.kv_heads * run.student.head_dim * half * run.element
    each = rows / copies
    read = (weights + cached * each) / (ENGINE_GPUS * cluster.memory_bandwidth * _DECODING)
    multiplied = 2 * run.student.total * each / (ENGINE_GPUS * cluster.tflops * 1e12 * cluster.utilization)
    speed = max(engines.server_gpus, 1) * cluster.tflops * 1e12 * cluster.utilization
    return EngineStep(
        generate=run.completion_length * max(read, multiplied),
        # Written once and read once: of an adapter it alone, of another student all that trains
        sync=run.element * run.student.trainable * 2 / engines.disk,
        score=2 * engines.active * tokens / speed if engines.server_gpus else 0.0,
        transfer=hidden_state_bytes(run, cluster, engines) / (engines.network * cluster.nodes),
        train=seconds.train + seconds.score + seconds.communicate + seconds.offload,
        staleness=engines.staleness,
    )


def hidden_state_bytes(run: PlannedRun, cluster: Cluster, engines: Engines) -> float:
    """Return the bytes of hidden states that a step takes from a teacher's servers; 0 without servers."""
    tokens = run.rows_generated * cluster.ranks * (run.prompt_length + run.completion_length)
    return float(tokens * engines.width * _STATE) if engines.server_gpus else 0.0


def gpu_hours(step: EngineStep, cluster: Cluster, engines: Engines) -> float:
    """Return what a step takes of all GPUs, those that wait included."""
    return (cluster.ranks + engines.student_gpus + engines.server_gpus) * step.total / 3600


def best_split(run: PlannedRun, seconds: StepTime, cluster: Cluster, engines: Engines) -> Engines:
    """Return the same GPUs beside the trainers, shared between engines and servers so that a step is shortest.

    Without servers there is nothing to share.
    """
    beside = engines.student_gpus + engines.server_gpus
    if not engines.server_gpus:
        return engines
    splits = [
        replace(engines, student_gpus=some, server_gpus=beside - some)
        for some in range(ENGINE_GPUS, beside, ENGINE_GPUS)
    ]
    return min(splits, key=lambda split: engine_step(run, seconds, cluster, split).total)
