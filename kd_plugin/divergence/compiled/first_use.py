"""Whether a panel loss runs compiled: where that is wanted, and a few rows come out as they do step by step.

A fault of a compiler, or of a card that it does not know, would train a wrong model without a word. So a run's first
positions are computed in both forms, once for each kind of loss, and the run goes on with the compiled one if they
agree. The same catches a machine without a compiler.

Shape suffixes: N positions, V tokens, H hidden width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_plugin.divergence.compiled.tiles import compilable, forced, wanted
from kd_plugin.divergence.modes import PanelGroup, TeacherTerm
from kd_plugin.errors import ConfigError
from kd_plugin.signals import HiddenSignal

if TYPE_CHECKING:
    from kd_plugin.divergence.fused import LossPlan, PassSums

logger = logging.getLogger(__name__)
# Positions of a group that are computed in both forms; of a group of one nothing is compiled
_ROWS = {"cpu": 16}
_ROWS_ACCELERATOR = 64
_NATS = 1e-4  # by which the forms may differ at a position beside the relative part
_RELATIVE = 0.01  # of losses and of gradients; tiles in bfloat16 round either way
_OF_WEIGHTS = 1e-4  # of the head's largest weight, for gradients that are almost zero

Pass = Callable[["LossPlan"], "PassSums"]


@dataclass
class _Found:
    """What this process found out, by kind of loss."""

    agreed: dict[object, bool]
    warned: bool = False


_found = _Found({})


def compiles(plan: LossPlan, hidden_NH: Tensor, weight_VH: Tensor, run: Pass) -> bool:
    """Whether the loss of ``plan`` runs compiled; at the first of its kind both forms are compared.

    Args:
        plan: the loss.
        hidden_NH: the student's hidden states.
        weight_VH: the student's head.
        run: computes a plan, over the same hidden states.

    Raises:
        ConfigError: KD_PLUGIN_COMPILE=1 asks for the compiled form, and it cannot be used.
    """
    device = hidden_NH.device
    terms = [(group, term) for group in plan.groups for term in group.terms]
    if not terms or not wanted(device):
        return False
    if not all(compilable(term.divergence or plan.divergence) for _, term in terms):
        return False
    kinds = {
        (group.combining, len(group.terms) > 1, term.divergence, term.temperature, term.signal.hidden.dtype)
        for group, term in terms
    }
    kind = (device, hidden_NH.dtype, plan.autocast, len(weight_VH), any(plan.needs), plan.divergence, frozenset(kinds))
    if kind not in _found.agreed:
        small = _shortened(plan, hidden_NH, _ROWS.get(device.type, _ROWS_ACCELERATOR))
        if not small.groups:
            return False
        apart = _apart(small, weight_VH, run)
        if apart is not None:
            _warn(apart, device)
        _found.agreed[kind] = apart is None
    return _found.agreed[kind]


def _apart(plan: LossPlan, weight_VH: Tensor, run: Pass) -> str | None:
    """Say why the compiled form is not used; None where it is."""
    expected = run(plan)
    if not bool(torch.isfinite(expected.loss)):
        return None  # the loss itself will say so
    try:
        got = run(replace(plan, compiled=True))
    except Exception as error:  # of a compiler, whatever it raises
        reason = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {reason[0]}"
    pairs = [(got.loss, expected.loss, _NATS * len(expected.entropy_N))]
    pairs += [(a, b, _NATS * len(a)) for a, b in zip(got.values, expected.values, strict=True)]
    if got.gradients[0] is not None and expected.gradients[0] is not None:
        largest = float(weight_VH.detach().abs().max())
        weight = max([1.0, *(float(w.abs().max()) for w in expected.weights if w.numel())])
        allowed = _OF_WEIGHTS * largest * weight * expected.gradients[0].numel() ** 0.5
        pairs.append((got.gradients[0], expected.gradients[0], allowed))
    for a, b, allowed in pairs:
        difference = float((a - b).norm())
        if not difference <= allowed + _RELATIVE * float(b.norm()):
            return f"it differs by {difference:.2e} where the norm is {float(b.norm()):.2e}"
    return None


def _shortened(plan: LossPlan, hidden_NH: Tensor, most: int) -> LossPlan:
    """Return the loss over the first positions of each group that has two or more; it asks for few gradients."""
    groups = []
    for group in plan.groups:
        size = len(hidden_NH) if group.positions is None else len(group.positions)
        if size < 2 or not group.terms:
            continue
        rows = min(most, size)
        positions = torch.arange(rows, device=hidden_NH.device)
        if group.positions is not None:
            positions = group.positions[:rows]
        terms = tuple(_cut(term, rows) for term in group.terms)
        groups.append(PanelGroup(positions, terms, group.combining, group.sharpness))
    return replace(plan, groups=tuple(groups), needs=(any(plan.needs), False, False))


def _cut(term: TeacherTerm, rows: int) -> TeacherTerm:
    signal = term.signal
    cut = HiddenSignal(signal.hidden[:rows], signal.head, signal.shared)
    return replace(term, signal=cut, weights=None if term.weights is None else term.weights[:rows])


def _warn(why: str, device: torch.device) -> None:
    """Say once that the loss is not compiled, or refuse where it has to be."""
    message = f"The compiled panel loss cannot be used on {device.type}: {why}."
    if forced():
        raise ConfigError(f"{message} KD_PLUGIN_COMPILE=1 asks for it; leave it out to run without.")
    if not _found.warned:
        _found.warned = True
        logger.warning(
            f"{message} The loss runs step by step, which takes longer and gives the same. KD_PLUGIN_COMPILE=0 leaves "
            "out the attempt, and this message."
        )
