"""Bytes that each GPU holds, part by part, for one ZeRO stage.

Symbols: P parameters, T trainable ones, N ranks, b bytes of a weight (2 in bf16). The optimizer is AdamW with a
float32 master copy and two float32 moments (Rajbhandari et al., arXiv 1910.02054, section 3.1). DeepSpeed's buffers are
read from its code (0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from kd_plugin.divergence.gradient import kept_rows
from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.projection import chunk_rows
from kd_plugin.divergence.spec import KINDS
from kd_plugin.planner.architectures import Architecture
from kd_plugin.planner.run import PlannedRun

# DeepSpeed gathers ahead: the layer that computes and the one that is fetched
_LAYERS_GATHERED = 2
_STATISTICS = 4  # softmax statistics and gradient sums are float32


@dataclass(frozen=True)
class Layout:
    """How training state is sharded and where it lives.

    Attributes:
        stage: ZeRO stage: 0 nothing is sharded, 1 optimizer, 2 also gradients, 3 also weights.
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
        loss: buffers of the fused loss, gathered heads and the head's gradient.
        hidden: teachers' hidden states, kept from scoring until the loss.
        gathered: the largest layers gathered at once under ZeRO-3.
        buckets: communication buffers.
        generation: weights that are gathered while the student generates, under ZeRO-3.
        kv_cache: keys and values of the completions that are generated at once.
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
        """Peak while the student generates completions; nothing waits for backward then."""
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
class StateBytes:
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


def state_bytes(run: PlannedRun, stage: int, ranks: int) -> StateBytes:
    """Compute the student's weights, gradients and optimizer states on the rank that holds most.

    Stages 1 and 2 lay the parameters of an optimizer group one after the other and cut the row into N equal parts. A
    parameter across a border has its whole gradient on both sides. Under stage 3 each parameter is sharded by itself,
    and one of up to ``persistence_threshold`` elements also stays gathered on each rank. DeepSpeed 0.19.8 keeps a
    float32 master copy in stages 1 to 3 even where the weights are float32.

    The gradients' peak: stage 1 keeps all of them until those of a step's last micro-batch are reduced; stage 2 holds
    a micro-batch's part and that of the earlier ones, to which it is added. Under all
    three the one that is being reduced, which can be the largest, is there beside them.
    """
    student, size = run.student, run.element
    total, trainable = student.total, student.trainable
    if stage == 0:
        master = 0 if run.precision == "fp32" else 4 * trainable
        return StateBytes(size * total, size * trainable, size * trainable, master + 8 * trainable)
    largest = max((p.numel for p in student.parameters if p.trainable), default=0)
    if stage in (1, 2):
        own, part = _cut_rows(student, ranks)
        peak = largest + (trainable if stage == 1 else own * min(run.accumulation, 2))
        return StateBytes(size * total, size * own, size * peak, 12 * part)
    parts = sum(-(-p.numel // ranks) for p in student.parameters if p.trainable)
    return StateBytes(sharded_bytes(run, student, ranks), size * parts, size * (parts + largest), 12 * parts)


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
    """Return the bytes of weights sharded by ZeRO-3: a part of each parameter, and small ones gathered beside it.

    Parts are of equal length, so what is gathered is a multiple of the ranks long.
    """
    threshold = persistence_threshold(run.student.hidden)
    parts = [(-(-p.numel // ranks), p.numel <= threshold) for p in shape.parameters]
    return run.element * sum(part * (1 + ranks * whole) for part, whole in parts)


def persistence_threshold(hidden: int) -> int:
    """Elements under which ZeRO-3 keeps a parameter gathered; what transformers fills in for ``auto``."""
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
    """Return the bytes of the gathered layers that ZeRO-3 holds at once: the student's, or a sharded teacher's."""
    shapes = [run.student] if stage == 3 else []
    shapes += [t.shape for t in run.placed("sharded") if t.shape is not None]
    layers = [max(_LAYERS_GATHERED * s.largest_layer, s.head_numel) for s in shapes]
    return run.element * max(layers, default=0)


def generation_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes of weights that are gathered beside a ZeRO-3 part while completions are generated.

    All of the student, or without ``gather_for_generation`` the layers that are gathered for each token anew.
    """
    if run.method == "offline" or stage < 3 or not run.generates:
        return 0
    return run.element * run.student.total if run.gather_for_generation else gathered_layers(run, stage)


def activations(run: PlannedRun, checkpointing: bool) -> int:
    """Return the bytes that a micro-batch of the student keeps for backward.

    With checkpointing: each layer's input, and what one layer keeps while it is computed again.
    """
    student, tokens, element = run.student, run.tokens_in_a_pass, run.element
    layer = layer_activations(run)
    if checkpointing:
        return student.layers * tokens * student.hidden * element + layer
    return student.layers * layer


def layer_activations(run: PlannedRun) -> int:
    """Return the bytes that one decoder layer keeps for backward, with fused attention (no L by L matrix).

    Per token, in elements of the forward dtype: the inputs of the q, k, v projections h, rotated q and k,
    v, the attention's output; the inputs of the MLP h; gate and up before and after the activation, and
    their product, 4 i. The two norms keep their input and their normalized input in float32 (4 h of 4 bytes, and
    2 h in the forward dtype). LoRA keeps the same inputs.
    """
    s = run.student
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    elements = 4 * s.hidden + 2 * queries + 2 * keys + 4 * s.intermediate
    return run.tokens_in_a_pass * (elements * run.element + 4 * s.hidden * 4)


def loss_workspace(run: PlannedRun, stage: int, device: str) -> int:
    """Return the bytes of the fused loss: one chunk's buffers, gradients formed in the pass, and gathered heads.

    Buffers are (rows, V) in float32, and in bf16 one more of two bytes for narrow products. A panel's loss is compiled
    on a GPU: it has fewer buffers, and keeps gradient tiles, in the dtype of products. The gradient of hidden states is
    (N, H), of a trained head (V, H), both float32.
    """
    s, place = run.student, torch.device(device)
    positions = run.micro_batch * run.completion_length
    rows = min(chunk_rows(s.vocab, place), positions)
    compiled = run.method == "panel" and place.type == "cuda"
    tiles = min(kept_rows(chunk_rows(s.vocab, place), place, compiled=True), positions) if compiled else rows
    narrow = run.element if run.precision == "bf16" or compiled else 0
    return (
        s.vocab * (rows * _STATISTICS * loss_buffers(run, compiled) + tiles * narrow)
        + loss_gradients(run)
        + gathered_head_bytes(run, stage)
    )


def loss_buffers(run: PlannedRun, compiled: bool = False) -> int:
    """Return how many (rows, V) float32 buffers the loss keeps at a step that is logged.

    Offline: the student's logits, and the probabilities of what is not listed. Panel: the student's
    log-probabilities and probabilities, a teacher's logits and log-probabilities; then scratch for the mixture inside
    jsd and skew_kl and for confidence's entropies; the sum over teachers where several score a position; a
    mixture's log-probabilities, and a copy for the divergence of each of its teachers. A test counts them.
    On CPU some are shorter, so that less is kept than is counted. A compiled panel has the student's logits, a
    teacher's, and one more for the sum or the mixture.
    """
    if run.method == "offline":
        return 2
    mode = MODES[run.combine]
    scratch = KINDS[run.divergence].scratch or mode.scratch
    summed = run.scored_by_all and len(run.teachers) > 1
    if compiled:
        return 2 + (summed if mode.buffers is None else 1)
    return 4 + scratch + (summed if mode.buffers is None else mode.buffers)


def loss_gradients(run: PlannedRun) -> int:
    """Return the bytes of the gradients that the loss forms: hidden states, and the head where it is trained."""
    s = run.student
    positions = run.micro_batch * run.completion_length
    head = s.head_numel if s.total == s.trainable else 0
    return _STATISTICS * (positions * s.hidden + head)


def gathered_head_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes of heads that are gathered for the loss: all sharded teachers', and a ZeRO-3 student's."""
    heads = [run.student.head_numel] if stage == 3 else []
    if run.method == "panel":
        heads += [t.shape.head_numel for t in run.placed("sharded") if t.shape is not None]
    return run.element * sum(heads)


def cached_hidden(run: PlannedRun) -> int:
    """Return the bytes of teachers' hidden states that wait for the loss, for all rows of a generation batch."""
    if run.method == "offline":
        # ids int64, log-probabilities and weights float32, for the listed tokens of one micro-batch
        return run.micro_batch * run.completion_length * run.listed * (8 + 4)
    positions = run.rows_generated * run.completion_length
    widths = [t.shape.hidden for t in run.placed("sharded", "resident", "offload") if t.shape is not None]
    widths += [run.student.hidden] * len(run.placed("adapter"))
    if not widths:
        return 0
    return positions * run.element * (sum(widths) if run.scored_by_all else max(widths))


def kv_cache(run: PlannedRun) -> int:
    """Return the bytes of keys and values for all rows that are generated at once, at full length; offline none."""
    if run.method == "offline" or not run.generates:
        return 0
    s = run.student
    tokens = run.rows_generated * (run.prompt_length + run.completion_length)
    return 2 * s.layers * s.kv_heads * s.head_dim * tokens * run.element
