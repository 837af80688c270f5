"""Estimated time of an optimizer step: floating-point work, generation, traffic and offload, one after the other.

FLOPs follow Kaplan et al. (arXiv 2001.08361): 2 a parameter and token forward, 4 backward, 2 more where activations
are computed again; LoRA needs no weight gradients of the frozen part (2 of the 4). Nothing is assumed to overlap, so
that the estimate ranks layouts with care rather than promises a speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_plugin.planner.cluster import Cluster
from kd_plugin.planner.communication import traffic
from kd_plugin.planner.memory import Layout, Memory
from kd_plugin.planner.run import PlannedRun


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
    return 2 * tokens * (sum(sizes) if run.judged_by_all else sum(sizes) / len(sizes))


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
        generate=generation_seconds(run, cluster) if panel else 0.0,
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
