"""The panel loss's tiles by compiled passes: which run compiles them, the compiled functions, and their state.

On a GPU the passes of a tile cost as much as its matrix products when each operation is a kernel of its own. Here they
are the functions of ``passes.py``, fused by ``torch.compile``. Each is compiled once a run for one divergence, dtype
and vocabulary, with any number of rows; Inductor keeps what it compiled on disk, so that the next run starts warm.

Shape suffixes: R positions of a chunk, V tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from kd_plugin.divergence.compiled import passes
from kd_plugin.divergence.projection import Workspace
from kd_plugin.divergence.spec import Divergence
from kd_plugin.errors import ConfigError
from kd_plugin.upstream import any_rows

_VARIABLE = "KD_PLUGIN_COMPILE"


def wanted(device: torch.device) -> bool:
    """Whether the loss is to be compiled on ``device``: what KD_PLUGIN_COMPILE says, else on a GPU.

    Raises:
        ConfigError: the variable is neither 0 nor 1.
    """
    said = os.environ.get(_VARIABLE, "")
    if said not in ("", "0", "1"):
        raise ConfigError(
            f"{_VARIABLE} is {said!r}; expected 1 to compile the loss, 0 to leave it as it is, or nothing: then it is "
            "compiled on a GPU."
        )
    return said == "1" if said else device.type == "cuda"


def forced() -> bool:
    """Whether KD_PLUGIN_COMPILE asks for the compiled form."""
    return os.environ.get(_VARIABLE) == "1"


def compilable(divergence: Divergence) -> bool:
    """Whether a divergence states what is compiled."""
    return divergence.kind.has_cells


def in_one_read(device: torch.device) -> bool:
    """Whether a KL divergence and the teacher's normalizer come from one read of the tiles.

    On a CPU Inductor keeps the exponentials of a whole tile in memory for that, which takes three times as long as the
    normalizer first and then the divergence.
    """
    return device.type != "cpu"


_ready: dict[object, Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Return a compiled copy of ``function``, the ``number``-th of all.

    Dynamo counts recompilations by code object, and gives up after a few: so each copy has a code object of its own.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True)


def run(function: Callable[..., Any], *tensors: Tensor | None, **static: Any) -> Any:
    """Call a function of ``passes.py``, compiled for these dtypes, widths and settings, with two rows or more."""
    layout = tuple(None if t is None else (t.shape[1:], t.stride(), t.dtype, t.device) for t in tensors)
    key = (layout, tuple(static.items()), tensors[0] is tensors[-1])
    if (function, key) not in _ready:
        _ready[function, key] = _compiled(function, len(_ready))
        for tensor in tensors:
            if tensor is not None:
                any_rows(tensor)
    return _ready[function, key](*tensors, **static)


@dataclass
class _Total:
    """A sum over teachers, (R, V), and what it is still to be multiplied by, (R, 1)."""

    sum_RV: Tensor
    scale_R1: Tensor | None = None


class CompiledTiles:
    """As :class:`~kd_plugin.divergence.tiles.Tiles`, by compiled passes; for two rows or more.

    Logits stay as the projection wrote them; of each row the normalizer is known. With one teacher no other memory is
    needed, with several one tile more for their sum.

    Args:
        workspace: where the buffers live.
        dtype: of all buffers.
        need_grad: whether :meth:`gradient` will be called.
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype, need_grad: bool) -> None:
        self._workspace, self._dtype, self._need_grad = workspace, dtype, need_grad

    def start(self, logits_RV: Tensor, multiplier: float, teachers: int) -> Tensor:
        """See :meth:`Tiles.start`."""
        self._student_RV, self._multiplier, self._left = logits_RV, multiplier, teachers
        # The student's normalizer, and Σ q as the former is rounded
        self._lse_R1, entropy_R, self._mass_R = run(passes.statistics, logits_RV)
        self._factor_R1 = torch.zeros_like(self._lse_R1)  # −Σ w·⟨q, a⟩
        self._logq_R1: Tensor | None = None  # how much of log q Σ w·a still lacks
        self._totals: dict[bool, _Total] = {}  # by whether the divergence is direct
        self._last: tuple[Divergence, Tensor] | None = None  # of a teacher that no total holds yet: and its weight
        return entropy_R

    def take(self, logits_RV: Tensor) -> None:
        """See :meth:`Tiles.take`."""
        self._teacher_RV = logits_RV
        self._teacher_lse_R1: Tensor | None = None

    def teacher_entropy(self) -> Tensor:
        """See :meth:`Tiles.teacher_entropy`."""
        self._teacher_lse_R1, entropy_R, _ = run(passes.statistics, self._teacher_RV)
        return entropy_R

    def value(self, divergence: Divergence) -> Tensor:
        """See :meth:`Tiles.value`."""
        return self._compare(_simplest(divergence))[0]

    def mix_into(self, mixed_RV: Tensor, share_R: Tensor) -> None:
        """See :meth:`Tiles.mix_into`."""
        if self._teacher_lse_R1 is None:
            self.teacher_entropy()
        run(passes.mixed, mixed_RV, self._teacher_RV, self._teacher_lse_R1, share_R.log().unsqueeze(-1))

    def add(self, weight_R: Tensor, divergence: Divergence) -> Tensor:
        """See :meth:`Tiles.add`."""
        divergence, weight_R1 = _simplest(divergence), (weight_R * self._multiplier).unsqueeze(-1)
        self._left -= 1
        if not self._need_grad:
            return self._compare(divergence)[0]
        if self._left == 0:
            value_R, mean_R = self._compare(divergence)
            self._last = divergence, weight_R1
        else:
            value_R, mean_R = self._compare(divergence, weight_R1)
        self._factor_R1 = self._factor_R1 - weight_R1 * mean_R.unsqueeze(-1)
        return value_R

    def _compare(self, divergence: Divergence, weight_R1: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return value and ⟨q, a⟩ (R,) of the teacher that was taken in last; with a weight, add its a to a total."""
        both = self._student_RV, self._lse_R1, self._teacher_RV
        if divergence.name in ("forward_kl", "reverse_kl") and in_one_read(self._student_RV.device):
            of_student = divergence.name == "reverse_kl"
            self._teacher_lse_R1, value_R = run(passes.kl_statistics, *both, of_student=of_student)
            if weight_R1 is not None:
                total, first = self._total(divergence)
                settings: dict[str, Any] = {"of_student": of_student, "first": first}
                teacher = self._teacher_RV, self._teacher_lse_R1
                run(passes.kl_added, *teacher, total.sum_RV, total.scale_R1, weight_R1, **settings)
                total.scale_R1 = None
                if of_student:
                    self._logq_R1 = weight_R1 if self._logq_R1 is None else self._logq_R1 + weight_R1
            return value_R, value_R if of_student else torch.full_like(value_R, -1.0)
        if self._teacher_lse_R1 is None:
            self.teacher_entropy()
        given = *both, self._teacher_lse_R1
        if weight_R1 is None:
            value_R, mean_R = run(passes.compared, *given, None, None, None, divergence=divergence)
        else:
            total, first = self._total(divergence)
            settings = {"divergence": divergence, "first": first}
            value_R, mean_R = run(passes.compared, *given, total.sum_RV, total.scale_R1, weight_R1, **settings)
            total.scale_R1 = None
        # Over the sum of q as it was rounded, so that what one token has alone falls away in the gradient
        mean_R = mean_R / self._mass_R
        return (mean_R if divergence.name == "reverse_kl" else value_R), mean_R  # there both are the same sum

    def _total(self, divergence: Divergence) -> tuple[_Total, bool]:
        """Return where the gradient of one more teacher goes, and whether it is the first there."""
        direct = divergence.kind.direct(divergence)
        first = direct not in self._totals
        if first:
            self._totals[direct] = _Total(self.buffer("direct" if direct else "a_sum"))
        return self._totals[direct], first

    def rescale(self, factor_R: Tensor) -> None:
        """See :meth:`Tiles.rescale`; the sums are multiplied when they are read next."""
        factor_R1 = factor_R.unsqueeze(-1)
        self._factor_R1 = self._factor_R1 * factor_R1
        self._logq_R1 = None if self._logq_R1 is None else self._logq_R1 * factor_R1
        for total in self._totals.values():
            total.scale_R1 = factor_R1 if total.scale_R1 is None else total.scale_R1 * factor_R1
        if self._last is not None:
            self._last = self._last[0], self._last[1] * factor_R1

    def gradient(self, out_RV: Tensor | None = None) -> Tensor:
        """See :meth:`Tiles.gradient`; written to ``out_RV`` where that is given."""
        out_RV = self._student_RV if out_RV is None else out_RV
        sums: list[Tensor | None] = []
        for direct in (False, True):
            total = self._totals.get(direct)
            sums += [None, None] if total is None else [total.sum_RV, total.scale_R1]
        last: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        divergence = Divergence()
        if self._last is not None:
            divergence, weight_R1 = self._last
            last = self._teacher_RV, self._teacher_lse_R1, weight_R1
        own = self._student_RV, self._lse_R1, self._factor_R1, self._logq_R1
        run(passes.gradient, *own, *sums, *last, out_RV, divergence=divergence)
        return out_RV

    def room(self, name: str, rows: int) -> Tensor:
        """See :meth:`Tiles.room`."""
        return self._workspace.get(name, rows, self._dtype)

    def buffer(self, name: str) -> Tensor:
        """See :meth:`Tiles.buffer`."""
        return self._workspace.get(name, self._student_RV.shape[0], self._dtype)


def _simplest(divergence: Divergence) -> Divergence:
    """Return the forward KL for a skew KL without skew, and leave out parameters that a divergence does not have."""
    if divergence.name == "skew_kl" and divergence.alpha == 0.0:
        return Divergence("forward_kl")
    return Divergence(divergence.name, **divergence.parameters)
