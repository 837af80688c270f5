"""Time and memory of the panel loss, one side after another on one card: ours in both forms, TRL's and Liger's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.panel_loss import Case, Problem
from tests.gpu.report import Place, Table, added_peak, form, seconds

SIZES = ((4096, 576, 49152), (4096, 2048, 128256), (4096, 4096, 151936), (4096, 4096, 151665))  # N, H, V


def liger(problem: Problem) -> Callable[[], Tensor] | None:
    """Return Liger's fused JSD over the same tensors, once a teacher; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[problem.case.divergence]
    loss = LigerFusedLinearJSD(jsd_beta=beta)

    def work() -> Tensor:
        parts = [loss(problem.hidden, problem.weight, hidden, weight) for hidden, weight in problem.panel]
        return torch.stack([part.sum() for part in parts]).sum()

    return work


def run(place: Place) -> Table:
    """Forward and backward of each side; ours against TRL's has to agree."""
    header = ("divergence", "teachers", "N", "H", "V", "side", "ms", "of TRL's", "GiB", "loss")
    table = Table("The loss alone, bfloat16: time and memory", header)
    sizes = place.pick(SIZES, ((64, 48, 2048), (64, 48, 2047)))
    for n, width, vocab in sizes:  # type: ignore[attr-defined]
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            for teachers in (1, 3):
                case = Case("bfloat16", teachers, n, vocab, width, width, divergence, place.device)
                _case(place, table, case)
    if not any(row[5] == "Liger" for row in table.rows):
        table.notes.append("Liger is not installed, or does not run here, and was left out.")
    return table


def _case(place: Place, table: Table, case: Case) -> None:
    problem = Problem(case)
    sides: dict[str, tuple[bool, Callable[[], Tensor]]] = {
        "TRL": (False, problem.trl),
        "ours, step by step": (False, problem.ours),
    }
    if place.is_gpu:
        sides["ours, compiled"] = (True, problem.ours)
    theirs = liger(problem) if place.is_gpu else None
    if theirs is not None:
        sides["Liger"] = (False, theirs)
    found: dict[str, float] = {}
    values: dict[str, float] = {}
    for side, (compiled, loss) in sides.items():

        def step(loss: Callable[[], Tensor] = loss) -> Tensor:
            problem.hidden.grad = problem.weight.grad = None
            value = loss()
            value.backward()
            return value

        with form(compiled):
            try:
                values[side] = float(step())
                found[side] = seconds(place, step, repeats=5 if place.is_gpu else 1)
                peak = added_peak(place, step)
            except Exception as error:
                if side != "Liger":
                    raise
                table.notes.append(f"Liger failed: {type(error).__name__}: {str(error)[:200]}")
                continue
        of_trl = f"{found[side] / found['TRL']:.2f}"
        own = (case.divergence, case.teachers, case.positions, case.student, case.vocab)
        table.rows.append((*own, side, f"{1e3 * found[side]:.2f}", of_trl, f"{peak:.2f}", f"{values[side]:.4f}"))
    for side in values:
        if side.startswith("ours") and not abs(values[side] - values["TRL"]) <= 0.02 * abs(values["TRL"]):
            table.failed.append(f"{case}: {side} is {values[side]}, TRL's {values['TRL']}.")
