"""One output head projected in chunks of positions, without the logits of all positions ever existing.

What ``fused``, ``sparse`` and ``sampled`` share: which dtype multiplies, and where a chunk's logits live.

Shape suffixes: N positions, R positions of one chunk, V real tokens, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, NonFiniteError
from kd_plugin.signals import OutputHead

# Logits of one chunk, in elements. On CPU small enough to stay near the caches and large enough that the matrix
# products run at full speed; accelerators need large products to be busy. tests/benchmarks/panel_loss.py measures it.
_CHUNK_ELEMENTS = {"cpu": 12 * 1024 * 1024}
_CHUNK_ELEMENTS_ACCELERATOR = 64 * 1024 * 1024
# MKL's float32 product of a few hundred rows with a whole head takes 1.1 to 1.4 times as long as in blocks of so many
# columns; in bfloat16 and float64 blocks gain nothing. Any width from 512 to 2,048 measured the same.
_CPU_COLUMNS = 1536


def require_finite(loss: Tensor, where: str) -> None:
    """Raise unless every element of ``loss`` is finite.

    Reading the answer waits for the device. The losses of this room call it themselves only on CPU, where waiting
    costs nothing; on an accelerator the host calls it when it reads the loss anyway, for its log.

    Args:
        loss: any tensor.
        where: what the message calls it, such as ``"the panel loss at step 12"``.

    Raises:
        NonFiniteError: an element is NaN or infinite.
    """
    if bool(torch.isfinite(loss.detach()).all()):
        return
    bad = loss.detach().flatten()
    bad = bad[~torch.isfinite(bad)]
    raise NonFiniteError(
        f"{where} is not finite: {bad.numel()} of {loss.numel()} values, the first is {bad[0].item()}. Look at the "
        "student's and the teacher's last hidden states for NaN or infinity; lower the learning rate, clip "
        "gradients, or use bfloat16 instead of float16."
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype for ``device``, or None where autocast is off.

    Asked before a pass, which then runs with autocast off: left on, it would also round sums of float32 losses.
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of softmax statistics, losses and gradient sums: float64 for float64 inputs, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """How many positions are projected at once."""
    return max(16, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ACCELERATOR) // vocab_size)


def chunks(count: int, rows: int) -> Iterator[slice]:
    """Cut ``count`` positions into slices of nearly equal length, none longer than ``rows``."""
    pieces = -(-count // rows)
    for i in range(pieces):
        yield slice(i * count // pieces, (i + 1) * count // pieces)


def needs_gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of the three need a gradient now; inside a Function's forward grad mode can no longer be asked."""
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


class Workspace:
    """Buffers of one chunk, made on first use and reused by every chunk and teacher.

    Args:
        rows: longest chunk.
        vocab_size: V.
        device: of all buffers.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.rows, self.vocab_size, self.device = rows, vocab_size, device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, dtype: torch.dtype, longest: int | None = None) -> Tensor:
        """Return the first ``rows`` rows of the buffer ``name``, (rows, V), with whatever it holds.

        The first call makes it, with ``longest`` rows, or as many as a chunk may have.
        """
        key = (name, dtype)
        if key not in self._buffers:
            size = (min(longest or self.rows, self.rows), self.vocab_size)
            self._buffers[key] = torch.empty(size, dtype=dtype, device=self.device)
        return self._buffers[key][:rows]


class Projector:
    """Projects chunks of hidden states through one gathered head into reused buffers.

    Args:
        head: a head from :meth:`OutputHead.real_rows`.
        name: the buffer that the logits are written to.
        workspace: where the buffers live; projectors of the same name overwrite each other's logits.
        dtype: of the matrix product.
        statistics: dtype of the logits that come out.
        temperature: divides the logits, after scale and soft-cap.
        keep_slope: also keep d logits / d projection where a soft-cap makes it vary.
    """

    def __init__(
        self,
        head: OutputHead,
        name: str,
        workspace: Workspace,
        dtype: torch.dtype,
        statistics: torch.dtype,
        temperature: float,
        keep_slope: bool = False,
    ) -> None:
        # An offloaded teacher's head comes to the device for as long as it is used
        self.weight_VH = head.weight.detach().to(workspace.device, dtype)
        self.bias_V = None if head.bias is None else head.bias.detach().to(workspace.device, statistics)
        self.multiplier = head.logit_scale / temperature
        self.workspace, self.statistics = workspace, statistics
        self._name, self._keep_slope = name, keep_slope
        self._cap = None if head.softcap is None else head.softcap / temperature
        self.slope_RV: Tensor | None = None

    def __call__(self, hidden_RH: Tensor) -> Tensor:
        """Logits (R, V) of one chunk, in a buffer that the next call overwrites."""
        rows = hidden_RH.shape[0]
        logits_RV = self.workspace.get(self._name, rows, self.statistics)
        self._matmul(hidden_RH, logits_RV)
        if self.bias_V is not None:
            logits_RV.add_(self.bias_V)
        if self._cap is None:
            return logits_RV if self.multiplier == 1.0 else logits_RV.mul_(self.multiplier)
        # softcap * tanh(scale * x / softcap) / T, whose slope in x is scale / T * (1 - tanh²)
        logits_RV.mul_(self.multiplier / self._cap).tanh_()
        if self._keep_slope:
            slope_RV = self.workspace.get("slope", rows, self.statistics)
            self.slope_RV = torch.mul(logits_RV, logits_RV, out=slope_RV).neg_().add_(1.0)
        return logits_RV.mul_(self._cap)

    def _matmul(self, hidden_RH: Tensor, out_RV: Tensor) -> None:
        """Project into ``out_RV``, which may be wider than the operands."""
        if hidden_RH.dtype == out_RV.dtype or can_widen(hidden_RH.dtype, out_RV.dtype, hidden_RH.device):
            _product(hidden_RH, self.weight_VH, out_RV)
        else:
            narrow_RV = self.workspace.get("narrow", hidden_RH.shape[0], hidden_RH.dtype)
            out_RV.copy_(torch.mm(hidden_RH, self.weight_VH.t(), out=narrow_RV))


@torch.no_grad()
def exact_logits(head: OutputHead, hidden: Tensor) -> Tensor:
    """Project hidden states (N, H) to logits (N, V) that are not rounded to the dtype of the operands.

    Where a training step rounds as the model does itself, for speed, this takes the time of a float32 product.

    Args:
        head: the head.
        hidden: (N, H) of any floating dtype; the weight is taken in it.

    Returns:
        Float32, or float64 for float64 hidden states.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        whole = head.real_rows()
        shape = (hidden.shape[0], whole.weight.shape[0])
        out_NV = torch.empty(shape, dtype=statistics_dtype(hidden), device=hidden.device)
        _product(hidden, whole.weight.detach().to(hidden.device), out_NV)
        return whole.shaped(out_NV)


def _product(hidden_RH: Tensor, weight_VH: Tensor, out_RV: Tensor) -> None:
    """Write ``hidden @ weight.T`` to ``out_RV``, summed and kept in its dtype."""
    narrow, wide = hidden_RH.dtype, out_RV.dtype
    if can_widen(narrow, wide, hidden_RH.device):
        torch.mm(hidden_RH, weight_VH.to(narrow).t(), out_dtype=wide, out=out_RV)
        return
    blocked = wide != narrow or (wide == torch.float32 and out_RV.device.type == "cpu")
    for part in chunks(weight_VH.shape[0], _CPU_COLUMNS) if blocked else (slice(None),):
        torch.mm(hidden_RH.to(wide), weight_VH[part].to(narrow).to(wide).t(), out=out_RV[:, part])


def scaled_once(ctx: Any, grad_output: Tensor, likes: tuple[torch.dtype, ...]) -> list[Tensor | None]:
    """Multiply the gradients that forward left on ``ctx`` by the incoming scalar, in place, and hand them over.

    Raises:
        ConfigError: backward runs a second time; the buffers were scaled and given away in the first.
    """
    if ctx.gradients is None:
        raise ConfigError(
            "Backward ran a second time through one fused loss. Its gradient is formed in forward and handed over "
            "once, to save memory: compute the loss again instead of using retain_graph=True."
        )
    gradients, ctx.gradients = ctx.gradients, None
    return [
        None if gradient is None else gradient.mul_(grad_output).to(dtype)
        for gradient, dtype in zip(gradients, likes, strict=True)
    ]


def without_unused(hidden_RH: Tensor, used_R1: Tensor) -> Tensor:
    """Zero the hidden states of positions that have no weight, so that whatever they hold cannot reach a sum."""
    return torch.where(used_R1, hidden_RH, torch.zeros((), dtype=hidden_RH.dtype, device=hidden_RH.device))


def require_hidden(hidden_NH: Tensor, temperature: float) -> None:
    """Refuse hidden states that are not (N, H), and what :func:`require_temperature` refuses."""
    if hidden_NH.dim() != 2:
        raise ConfigError(
            f"student_hidden has shape {tuple(hidden_NH.shape)}; expected (positions, width). Select the scored "
            "positions first, as hidden[mask]."
        )
    require_temperature(temperature)


def require_temperature(temperature: float) -> None:
    """Refuse a temperature that cannot divide logits."""
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (number and math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature!r}; it divides logits and must be a positive number.")


def require_matching_rows(student: OutputHead, teacher: OutputHead, whose: str) -> None:
    """Refuse two gathered heads with different numbers of real tokens."""
    mine, theirs = student.weight.shape[0], teacher.weight.shape[0]
    if mine != theirs:
        raise ConfigError(
            f"The student's head has {mine} rows and {whose} has {theirs}. A divergence needs the same tokens on both "
            "sides: set OutputHead.vocab_size to the tokenizer's size on both, so that padded rows are cut."
        )


def can_widen(dtype: torch.dtype, statistics: torch.dtype, device: torch.device) -> bool:
    """Whether a product of ``dtype`` can be written as float32 without being rounded first (CUDA, torch 2.8)."""
    return device.type == "cuda" and statistics == torch.float32 and dtype in (torch.float16, torch.bfloat16)
