"""Bytes that each GPU holds, part by part, for one ZeRO stage.

Symbols: P parameters, T trainable ones, N ranks, b bytes of a weight (2 in bf16). The optimizer is AdamW with a
float32 master copy and two float32 moments (Rajbhandari et al., arXiv 1910.02054, section 3.1). DeepSpeed's buffers are
read from its code (0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kd_plugin.zero.run import PlannedRun
from kd_plugin.zero.workspace import activations, cached_hidden, kv_cache, loss_workspace

# DeepSpeed gathers ahead: the layer that computes and the one that is fetched
_LAYERS_GATHERED = 2


@dataclass(frozen=True)
class Layout:
    """How training state is cut and where it lives.

    Attributes:
        stage: ZeRO stage: 0 nothing is cut, 1 optimizer, 2 also gradients, 3 also weights.
        offload_optimizer: ``none``, ``cpu`` or ``nvme``.
        offload_parameters: likewise; needs stage 3.
        checkpointing: activations are computed again in backward, layer by layer.
    """

    stage: int
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    checkpointing: bool = True

    @property
    def name(self) -> str:
        """A short name such as ``ZeRO-3, optimizer on cpu``."""
        parts = [f"ZeRO-{self.stage}"]
        if self.offload_optimizer != "none":
            parts.append(f"optimizer on {self.offload_optimizer}")
        if self.offload_parameters != "none":
            parts.append(f"weights on {self.offload_parameters}")
        if not self.checkpointing:
            parts.append("no checkpointing")
        return ", ".join(parts)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while it trains, and the extremes before and beside it.

    Attributes:
        weights: the student's, and LoRA's.
        gradients: of the trainable parameters, as held when the optimizer steps.
        optimizer: float32 master copy and moments.
        teachers: weights of the teachers that are on the GPU at once.
        activations: kept for backward, in one micro-batch.
        loss: buffers of the fused loss, whole heads and the head's gradient.
        hidden: teachers' hidden states, kept from scoring until the loss.
        gathered: the largest layers made whole at once under ZeRO-3.
        buckets: communication buffers.
        generation: what generation takes beside the resident parts: weights made whole, KV cache.
        host: bytes of offloaded state in this GPU's share of host memory or NVMe.
    """

    weights: int
    gradients: int
    optimizer: int
    teachers: int
    activations: int
    loss: int
    hidden: int
    gathered: int
    buckets: int
    generation: int
    host: int

    @property
    def resident(self) -> int:
        """Bytes that stay through the whole run."""
        return self.weights + self.gradients + self.optimizer + self.teachers + self.buckets

    @property
    def training(self) -> int:
        """Peak while a step is computed; activations and the loss's buffers are alive together."""
        return self.resident + self.activations + self.loss + self.hidden + self.gathered

    @property
    def peak(self) -> int:
        """The larger of training's and generation's peaks."""
        return max(self.training, self.resident + self.generation)

    def to_json(self) -> dict[str, int]:
        """Return every part in bytes, and the sums."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**parts, "resident": self.resident, "training": self.training, "peak": self.peak}


def memory(run: PlannedRun, layout: Layout, ranks: int) -> Memory:
    """Compute what one of ``ranks`` GPUs holds."""
    weights, gradients, optimizer = state_bytes(run, layout.stage, ranks)
    host = 0
    if layout.offload_optimizer != "none":
        # The CPU optimizer keeps the gradients of its part beside its states
        host += optimizer + (gradients if layout.stage >= 2 else 0)
        optimizer, gradients = 0, 0 if layout.stage >= 2 else gradients
    if layout.offload_parameters != "none":
        host += weights
        weights = 0
    teachers, teachers_host = teacher_bytes(run, ranks)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        teachers=teachers,
        activations=activations(run, layout.checkpointing),
        loss=loss_workspace(run, layout.stage, device="cuda"),
        hidden=cached_hidden(run),
        gathered=gathered_layers(run, layout.stage),
        buckets=bucket_elements(run.student.hidden) * 2 * run.element if layout.stage >= 1 else 0,
        generation=generation_bytes(run, layout.stage),
        host=host + teachers_host,
    )


def state_bytes(run: PlannedRun, stage: int, ranks: int) -> tuple[int, int, int]:
    """Return the bytes of the student's weights, gradients and optimizer states on one rank.

    Under stage 3 a parameter of fewer than ``persistence_threshold`` elements stays whole on each rank beside its
    part. Stage 1 holds all gradients until the step reduces them. DeepSpeed 0.19.8 keeps a float32 master copy in
    stages 1 to 3 even where the weights are float32 (counted on two ranks).
    """
    student = run.student
    total, trainable = student.total, student.trainable
    if stage == 0:
        master = 0 if run.precision == "fp32" else 4 * trainable
        return run.element * total, run.element * trainable, master + 8 * trainable
    if stage in (1, 2):
        part = -(-trainable // ranks)
        return run.element * total, run.element * (trainable if stage == 1 else part), 12 * part
    parts = sum(-(-p.numel // ranks) for p in student.parameters)
    trainable_parts = sum(-(-p.numel // ranks) for p in student.parameters if p.trainable)
    whole = sum(p.numel for p in student.parameters if p.numel < persistence_threshold(student.hidden))
    return run.element * (parts + whole), run.element * trainable_parts, 12 * trainable_parts


def persistence_threshold(hidden: int) -> int:
    """Elements under which ZeRO-3 keeps a parameter whole; what transformers fills in for ``auto``."""
    return 10 * hidden


def bucket_elements(hidden: int) -> int:
    """Elements of a reduction bucket; what transformers fills in for ``auto``."""
    return hidden * hidden


def teacher_bytes(run: PlannedRun, ranks: int) -> tuple[int, int]:
    """Return the bytes of the teachers' weights on a GPU, and on its share of host memory.

    One offloaded teacher is on the GPU at a time; all of them are in host memory.
    """
    sizes = {
        placement: [run.element * t.shape.total for t in run.placed(placement) if t.shape is not None]
        for placement in ("resident", "sharded", "offload")
    }
    offloaded = sizes["offload"]
    on_gpu = sum(sizes["resident"]) + sum(-(-size // ranks) for size in sizes["sharded"]) + max(offloaded, default=0)
    return on_gpu, sum(offloaded)


def gathered_layers(run: PlannedRun, stage: int) -> int:
    """Return the bytes of the whole layers that ZeRO-3 holds at once: the student's, or a sharded teacher's."""
    shapes = [run.student] if stage == 3 else []
    shapes += [t.shape for t in run.placed("sharded") if t.shape is not None]
    layers = [max(_LAYERS_GATHERED * s.largest_layer, s.head_numel) for s in shapes]
    return run.element * max(layers, default=0)


def generation_bytes(run: PlannedRun, stage: int) -> int:
    """Return what writing completions takes beside the resident parts; 0 for offline KD.

    With gathered weights the whole student is on each GPU, as well as its own part.
    """
    if run.method == "offline":
        return 0
    whole = run.element * run.student.total if stage == 3 and run.gather_for_generation else 0
    layers = gathered_layers(run, stage) if stage == 3 and not run.gather_for_generation else 0
    return whole + layers + kv_cache(run)
