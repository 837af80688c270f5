"""A step where engines generate for the student and servers score, on GPUs beside those that train.

Three sides work on one generation batch: engines write it, servers read it, trainers learn from it. With weights that
may be a step behind, engines write the next batch while the others are at this one.

Rates are stated, not measured: a GPU's as in ``Cluster``; of its memory's bandwidth decoding reaches a share; what a
server sends reaches a trainer's node over HTTP; weights go through a shared directory, written by one rank and read by
every engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kd_plugin.errors import ConfigError
from kd_plugin.planner.run import Cluster, PlannedRun
from kd_plugin.planner.time import StepTime

ENGINE_GPUS = 8  # GPUs that hold one copy of the student, by tensor parallelism
_DECODING = 0.5  # share of the memory's bandwidth that decoding reaches
_STATE = 2  # bytes of a value that a server sends


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
        sync: the student's weights from the trainers to the engines.
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
        sync=weights * 2 / engines.disk,
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
