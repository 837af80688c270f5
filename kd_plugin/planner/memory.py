"""Bytes that each GPU holds, part by part, for one ZeRO stage.

Symbols: P parameters, T trainable ones, N ranks, b bytes of a weight (2 in bf16). The optimizer is AdamW with a
float32 master copy and two float32 moments (Rajbhandari et al., arXiv 1910.02054, section 3.1). DeepSpeed's buffers are
read from its code (0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kd_plugin.planner.architectures import Architecture
from kd_plugin.planner.run import PlannedRun
from kd_plugin.planner.workspace import activations, cached_hidden, kv_cache, loss_workspace

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
        gradients: of the trainable parameters, as held when the optimizer steps, after they were reduced.
        gradients_peak: the same while backward runs, before all of them are reduced.
        optimizer: float32 master copy and moments.
        teachers: weights of the teachers that are on the GPU at once.
        activations: kept for backward, in one micro-batch.
        loss: buffers of the fused loss, whole heads and the head's gradient.
        hidden: teachers' hidden states, kept from scoring until the loss.
        gathered: the largest layers made whole at once under ZeRO-3.
        buckets: communication buffers.
        generation: weights that are made whole while the student writes, under ZeRO-3.
        kv_cache: keys and values of the completions that are written at once.
        host: bytes of offloaded state in this GPU's share of host memory or NVMe.
    """

    weights: int
    gradients: int
    gradients_peak: int
    optimizer: int
    teachers: int
    activations: int
    loss: int
    hidden: int
    gathered: int
    buckets: int
    generation: int
    kv_cache: int
    host: int

    @property
    def resident(self) -> int:
        """Bytes that stay through the whole run."""
        return self.weights + self.gradients + self.optimizer + self.teachers + self.buckets

    @property
    def training(self) -> int:
        """Peak while a step is computed; activations, the loss's buffers and all gradients are taken to meet."""
        passing = self.gradients_peak - self.gradients
        return self.resident + passing + self.activations + self.loss + self.hidden + self.gathered

    @property
    def writing(self) -> int:
        """Peak while the student writes completions; nothing waits for backward then."""
        return self.resident + self.generation + self.kv_cache

    @property
    def peak(self) -> int:
        """The larger of the peaks of training and writing."""
        return max(self.training, self.writing)

    def to_json(self) -> dict[str, int]:
        """Return every part in bytes, and the sums."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**parts, "resident": self.resident, "training": self.training, "peak": self.peak}


@dataclass(frozen=True)
class State:
    """Bytes of the student's training state on the rank that holds most; parts as in :class:`Memory`."""

    weights: int
    gradients: int
    gradients_peak: int
    optimizer: int


def memory(run: PlannedRun, layout: Layout, ranks: int) -> Memory:
    """Compute what one of ``ranks`` GPUs holds."""
    state = state_bytes(run, layout.stage, ranks)
    weights, optimizer, gradients, peak = state.weights, state.optimizer, state.gradients, state.gradients_peak
    host = 0
    if layout.offload_optimizer != "none":
        # Beside its states the CPU optimizer keeps its part's gradients, accumulated and in float32
        host += optimizer + optimizer // 12 * (4 + run.element)
        optimizer, gradients, peak = 0, 0, _peak_beside_offload(run, layout.stage)
    if layout.offload_parameters != "none":
        host += weights
        weights = 0
    teachers, teachers_host = teacher_bytes(run, ranks)
    return Memory(
        weights=weights,
        gradients=gradients,
        gradients_peak=peak,
        optimizer=optimizer,
        teachers=teachers,
        activations=activations(run, layout.checkpointing),
        loss=loss_workspace(run, layout.stage, device="cuda"),
        hidden=cached_hidden(run),
        gathered=gathered_layers(run, layout.stage),
        buckets=bucket_elements(run.student.hidden) * 2 * run.element if layout.stage >= 1 else 0,
        generation=generation_bytes(run, layout.stage),
        kv_cache=kv_cache(run),
        host=host + teachers_host,
    )


def state_bytes(run: PlannedRun, stage: int, ranks: int) -> State:
    """Compute the student's weights, gradients and optimizer states on the rank that holds most.

    Stages 1 and 2 lay the parameters of an optimizer group one after the other and cut the row into N equal parts. A
    parameter across a border has its whole gradient on both sides. Under stage 3 each parameter is cut by itself, and
    one of up to ``persistence_threshold`` elements also stays whole on each rank. DeepSpeed 0.19.8 keeps a float32
    master copy in stages 1 to 3 even where the weights are float32.

    The gradients' peak: stage 1 keeps all of them until those of a step's last micro-batch are reduced; stage 2 holds
    a micro-batch's part and that of the earlier ones, to which it is added. Under all
    three the one that is being reduced, which can be the largest, is there beside them.
    """
    student, size = run.student, run.element
    total, trainable = student.total, student.trainable
    if stage == 0:
        master = 0 if run.precision == "fp32" else 4 * trainable
        return State(size * total, size * trainable, size * trainable, master + 8 * trainable)
    largest = max((p.numel for p in student.parameters if p.trainable), default=0)
    if stage in (1, 2):
        own, part = _cut_rows(student, ranks)
        peak = largest + (trainable if stage == 1 else own * min(run.accumulation, 2))
        return State(size * total, size * own, size * peak, 12 * part)
    parts = sum(-(-p.numel // ranks) for p in student.parameters if p.trainable)
    return State(sharded_bytes(run, student, ranks), size * parts, size * (parts + largest), 12 * parts)


def _peak_beside_offload(run: PlannedRun, stage: int) -> int:
    """Return the bytes of gradients on the GPU where the optimizer is in host memory: what has not gone there yet.

    Stage 1 sends them when the last micro-batch is through. Stages 1 and 2 keep a buffer of the
    largest for the way back.
    """
    trained = [p.numel for p in run.student.parameters if p.trainable]
    largest = max(trained, default=0)
    return run.element * ({1: sum(trained) + largest, 2: 2 * largest}.get(stage, largest))


def _cut_rows(student: Architecture, ranks: int) -> tuple[int, int]:
    """Cut the rows of trained parameters, those with and those without weight decay, into one part a rank.

    Returns:
        The elements of all parameters that a rank's parts touch, on the rank where they are most; a part's length.
    """
    touched, length = [0] * ranks, 0
    for matrix in (True, False):
        sizes = [p.numel for p in student.parameters if p.trainable and p.matrix == matrix]
        part, end = -(-sum(sizes) // ranks), 0
        length += part
        for size in sizes:
            start, end = end, end + size
            for rank in range(start // part, (end - 1) // part + 1):
                touched[rank] += size
    return max(touched), length


def sharded_bytes(run: PlannedRun, shape: Architecture, ranks: int) -> int:
    """Return the bytes of weights cut by ZeRO-3: a part of each parameter, and small ones whole beside it.

    Parts are of equal length, so what is whole is a multiple of the ranks long.
    """
    threshold = persistence_threshold(run.student.hidden)
    parts = [(-(-p.numel // ranks), p.numel <= threshold) for p in shape.parameters]
    return run.element * sum(part * (1 + ranks * whole) for part, whole in parts)


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
    shapes = {
        placement: [t.shape for t in run.placed(placement) if t.shape is not None]
        for placement in ("resident", "sharded", "offload")
    }
    whole = [run.element * shape.total for shape in shapes["resident"]]
    parts = [sharded_bytes(run, shape, ranks) for shape in shapes["sharded"]]
    offloaded = [run.element * shape.total for shape in shapes["offload"]]
    return sum(whole) + sum(parts) + max(offloaded, default=0), sum(offloaded)


def gathered_layers(run: PlannedRun, stage: int) -> int:
    """Return the bytes of the whole layers that ZeRO-3 holds at once: the student's, or a sharded teacher's."""
    shapes = [run.student] if stage == 3 else []
    shapes += [t.shape for t in run.placed("sharded") if t.shape is not None]
    layers = [max(_LAYERS_GATHERED * s.largest_layer, s.head_numel) for s in shapes]
    return run.element * max(layers, default=0)


def generation_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes of weights that are whole beside a ZeRO-3 part while completions are written.

    All of the student, or without ``gather_for_generation`` the layers that are gathered for each token anew.
    """
    if run.method == "offline" or stage < 3:
        return 0
    return run.element * run.student.total if run.gather_for_generation else gathered_layers(run, stage)
