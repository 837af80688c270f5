"""Bytes that depend on the tokens in flight: activations, the fused loss, cached hidden states, the KV cache."""

from __future__ import annotations

import torch

from kd_plugin.divergence.modes import MODES
from kd_plugin.divergence.projection import chunk_rows
from kd_plugin.divergence.spec import KINDS
from kd_plugin.planner.run import PlannedRun

_STATISTICS = 4  # softmax statistics and gradient sums are float32


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
    their product, 4 i. The two norms keep their input and their normalised input in float32 (4 h of 4 bytes, and
    2 h in the forward dtype). LoRA keeps the same inputs.
    """
    s = run.student
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    elements = 4 * s.hidden + 2 * queries + 2 * keys + 4 * s.intermediate
    return run.tokens_in_a_pass * (elements * run.element + 4 * s.hidden * 4)


def loss_workspace(run: PlannedRun, stage: int, device: str) -> int:
    """Return the bytes of the fused loss: one chunk's buffers, gradients formed in the pass, and whole heads.

    Buffers are (rows, V) in float32, and in bf16 one more of two bytes for narrow products. The gradient of hidden
    states is (N, H), of a trained head (V, H), both float32.
    """
    s = run.student
    positions = run.micro_batch * run.completion_length
    rows = min(chunk_rows(s.vocab, torch.device(device)), positions)
    narrow = run.element if run.precision == "bf16" else 0
    return rows * s.vocab * (_STATISTICS * loss_buffers(run) + narrow) + loss_gradients(run) + whole_heads(run, stage)


def loss_buffers(run: PlannedRun) -> int:
    """Return how many (rows, V) float32 buffers the loss keeps at a step that is logged.

    Offline: the student's logits, and the probabilities of what is not listed. Panel: the student's
    log-probabilities and probabilities, a teacher's logits and log-probabilities; then scratch for the mixture inside
    jsd and skew_kl and for confidence's entropies; the sum over teachers where several judge a position; a
    mixture's log-probabilities, and a copy for the divergence of each of its teachers. A test counts them.
    On CPU some are shorter, so that less is kept than is counted.
    """
    if run.method == "offline":
        return 2
    mode = MODES[run.combine]
    scratch = KINDS[run.divergence].scratch or mode.scratch
    summed = run.judged_by_all and len(run.teachers) > 1
    return 4 + scratch + (summed if mode.buffers is None else mode.buffers)


def loss_gradients(run: PlannedRun) -> int:
    """Return the bytes of the gradients that the loss forms: hidden states, and the head where it is trained."""
    s = run.student
    positions = run.micro_batch * run.completion_length
    head = s.head_numel if s.total == s.trainable else 0
    return _STATISTICS * (positions * s.hidden + head)


def whole_heads(run: PlannedRun, stage: int) -> int:
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
    return positions * run.element * (sum(widths) if run.judged_by_all else max(widths))


def kv_cache(run: PlannedRun) -> int:
    """Return the bytes of keys and values for all rows that are generated at once, at full length; offline none."""
    if run.method == "offline":
        return 0
    s = run.student
    tokens = run.rows_generated * (run.prompt_length + run.completion_length)
    return 2 * s.layers * s.kv_heads * s.head_dim * tokens * run.element
