"""Time and memory of the fused losses against TRL's: its divergence called once a teacher, and its SFT loss.

    python -m tests.benchmarks.panel_loss            # all tables, about ten minutes on 2 cores
    python -m tests.benchmarks.panel_loss --quick    # small sizes, seconds; checks that both sides agree
    python -m tests.benchmarks.panel_loss --compiled # the loss compiled, step by step and TRL's, all divergences
    python -m tests.benchmarks.panel_loss --compiling  # how long compiling takes

Both sides run forward and backward on the same tensors, alternating within one process, and the medians are compared;
so load from elsewhere meets both. ``cached`` is the sparse loss (64 tokens a position, labels with cross-entropy)
against the kernel of SFTTrainer's loss. Memory is measured apart, one new process a side: the peak resident set during
forward and backward (VmHWM, reset before) less the resident set before, so gradients and everything that the kernels
allocate count. Writes Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, fused_sparse_divergence
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("ours", "trl")
FORMS = ("compiled", "plain", "trl")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


@dataclass(frozen=True)
class Case:
    """One size; widths are those of a small student and a larger teacher."""

    dtype: str = "float32"
    teachers: int = 1
    positions: int = 1024
    vocab: int = 49152
    student: int = 576
    teacher: int = 960
    divergence: str = "reverse_kl"
    device: str = "cpu"


class Problem:
    """The tensors of a case, and the two ways to its loss and gradients."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[case.dtype]

        def draw(rows: int, width: int, scale: float) -> Tensor:
            return torch.randn(rows, width, dtype=dtype, device=case.device).mul_(scale)

        self.case, self.kd_weight = case, 1.0
        if case.divergence == "cached":
            logprobs, ids = torch.log_softmax(torch.randn(case.positions, case.vocab) * 2, -1).topk(64)
            self.cached = SparseSignal(ids, logprobs.half(), torch.log1p(-logprobs.exp().sum(-1)))
            self.labels = torch.randint(0, case.vocab, (case.positions,))
        self.hidden = draw(case.positions, case.student, 1.0).requires_grad_()
        self.weight = draw(case.vocab, case.student, 1.5 * case.student**-0.5).requires_grad_()
        self.panel = [
            (draw(case.positions, case.teacher, 1.0), draw(case.vocab, case.teacher, 1.5 * case.teacher**-0.5))
            for _ in range(case.teachers)
        ]

    def ours(self) -> Tensor:
        if self.case.divergence == "cached":
            head, forward = OutputHead(self.weight), Divergence("forward_kl")
            sparse = fused_sparse_divergence(
                self.hidden, head, self.cached, forward, labels=self.labels, kd_weight=self.kd_weight, ce_weight=1.0
            )
            return sparse.loss_sum / self.case.positions
        terms = tuple(TeacherTerm(HiddenSignal(hidden, OutputHead(weight))) for hidden, weight in self.panel)
        divergence = Divergence(self.case.divergence)
        loss = fused_panel_divergence(self.hidden, OutputHead(self.weight), [PanelGroup(None, terms)], divergence)
        return loss.loss_sum / self.case.positions

    def trl(self) -> Tensor:
        if self.case.divergence == "cached":
            from trl.kernels import ChunkedLogProbFunction
            from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

            metrics = ("entropy", "is_top1")  # what SFTTrainer logs
            arguments = (self.labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, metrics)
            logprobs = ChunkedLogProbFunction.apply(self.hidden, self.weight, None, *arguments)[0]
            return -logprobs.sum() / self.case.positions
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[self.case.divergence]
        mask = torch.ones(1, self.case.positions, device=self.case.device)
        losses = [
            _chunked_divergence_loss(self.hidden[None], hidden[None], self.weight, weight, mask, beta)[0]
            for hidden, weight in self.panel
        ]
        return torch.stack(losses).sum()

    def compiled(self) -> Tensor:
        with mock.patch.dict(os.environ, KD_PLUGIN_COMPILE="1"):
            return self.ours()

    def plain(self) -> Tensor:
        with mock.patch.dict(os.environ, KD_PLUGIN_COMPILE="0"):
            return self.ours()

    def step(self, side: str) -> tuple[float, tuple[float, float, float]]:
        """Seconds of one forward and backward; loss and the gradients' norms."""
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        start = time.perf_counter()
        loss = getattr(self, side)()
        loss.backward()
        seconds = time.perf_counter() - start
        return seconds, (loss.item(), self.hidden.grad.float().norm().item(), self.weight.grad.float().norm().item())


def times(case: Case, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each side, alternating; and the largest relative difference of loss and gradient norms."""
    problem = Problem(case)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    results: dict[str, tuple[float, float, float]] = {}
    for _ in range(repeats):
        for side in SIDES:
            spent, results[side] = problem.step(side)
            seconds[side].append(spent)
    if case.divergence == "cached":  # the same loss only without the targets
        problem.kd_weight = 0.0
        results["ours"] = problem.step("ours")[1]
    apart = max(abs(a - b) / abs(b) for a, b in zip(results["ours"], results["trl"], strict=True))
    return {side: statistics.median(values) for side, values in seconds.items()}, apart


def added_peak_here(case: Case, side: str) -> int:
    """Bytes by which the resident set of this process peaks during one step; Linux only."""
    problem = Problem(case)
    Problem(Case(case.dtype, 1, 8, 256, 8, 8, case.divergence)).step(side)  # imports and thread pools
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present resident set
    before = _status("VmRSS")
    problem.step(side)
    return _status("VmHWM") - before


def added_peak(case: Case, side: str) -> int:
    """The same, measured in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.panel_loss", "--memory-of", side, json.dumps(asdict(case))]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def row(case: Case, repeats: int, memory: bool) -> str:
    """One line of a table."""
    seconds, apart = times(case, repeats)
    cells = [case.dtype, case.divergence, case.teachers, case.positions, case.vocab]
    cells += [f"{seconds['trl']:.2f}", f"{seconds['ours']:.2f}", f"**{seconds['ours'] / seconds['trl']:.2f}**"]
    if memory:
        peak = {side: added_peak(case, side) for side in SIDES}
        cells += [f"{peak['trl'] / 2**20:.0f}", f"{peak['ours'] / 2**20:.0f}", f"**{peak['ours'] / peak['trl']:.2f}**"]
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(str(cell) for cell in [*cells, f"{apart:.0e}"]) + " |"


def forms(repeats: int, cases: list[Case], chosen: tuple[str, ...] = FORMS) -> None:
    """Print the loss compiled and step by step against TRL's, where it has the divergence; alternating.

    The time compiled relative to that step by step is the median over rounds, with its quartiles.
    """
    sides = "compiled s | plain s | TRL s | of plain | compiled of TRL | plain of TRL"
    print(f"| dtype | divergence | teachers | N | V | {sides} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in cases:
        problem = Problem(case)
        there = [side for side in chosen if side != "trl" or case.divergence != "skew_kl"]
        for side in ("compiled", "plain"):
            problem.step(side)
        spent: dict[str, list[float]] = {side: [] for side in there}
        for _ in range(repeats):
            for side in there:
                spent[side].append(problem.step(side)[0])
        median = {side: statistics.median(values) for side, values in spent.items()}
        cells: list[object] = [case.dtype, case.divergence, case.teachers, case.positions, case.vocab]
        cells += [f"{median[side]:.2f}" if side in median else "" for side in FORMS]
        relative = [a / b for a, b in zip(spent["compiled"], spent["plain"], strict=True)]
        low, middle, high = statistics.quantiles(relative, n=4) if repeats > 1 else relative * 3
        cells += [f"**{middle:.2f}** ({low:.2f} to {high:.2f})"]
        cells += [f"{median[side] / median['trl']:.2f}" if "trl" in median else "" for side in FORMS[:2]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def form_cases(quick: bool, vocab: int) -> list[Case]:
    """All divergences and dtypes with one, three and eight teachers; as many positions as one chunk has, or half."""
    if quick:
        return [Case("float32", 1, 64, 2048, 48, 80)]
    rows = 240 * 49152 // vocab
    sizes = {1: rows, 3: rows, 8: rows // 2}
    return [
        Case(dtype, n, size, vocab, divergence=d) for d in DIVERGENCES for dtype in DTYPES for n, size in sizes.items()
    ]


def compile_times(divergences: list[str]) -> None:
    """Print how long the first compiled loss of a process takes, with whatever Inductor's cache holds."""
    print("| divergence | teachers | first, s | second, s |\n|---|---|---|---|", flush=True)
    for divergence in divergences:
        for teachers in (1, 3):
            problem = Problem(Case("float32", teachers, 32, divergence=divergence))
            first, second = (problem.step("compiled")[0] for _ in range(2))
            print(f"| {divergence} | {teachers} | {first:.1f} | {second:.2f} |", flush=True)


HEADER = (
    "| dtype | divergence | teachers | N | V | TRL s | ours s | time | TRL MiB | ours MiB | memory | apart |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def tables(quick: bool) -> list[tuple[str, list[Case]]]:
    """The tables and their cases."""
    if quick:
        panels = [Case(dtype, n, 64, 2048, 48, 80) for dtype in DTYPES for n in (1, 3)]
        return [("Smoke", [*panels, *(Case(dtype, 0, 64, 2048, 48, 80, "cached") for dtype in DTYPES)])]
    return [
        ("One and three teachers", [Case(dtype, n) for dtype in DTYPES for n in (1, 3)]),
        ("Other divergences", [Case(dtype, 1, divergence=d) for dtype in DTYPES for d in ("forward_kl", "jsd")]),
        ("Cached targets against SFT", [Case(dtype, 0, divergence="cached") for dtype in DTYPES]),
        ("Growing number of teachers", [Case("bfloat16", n, positions=512) for n in (1, 2, 4, 8)]),
        ("Growing number of positions", [Case("bfloat16", 1, positions=n) for n in (256, 1024, 2048)]),
        ("Growing vocabulary", [Case("bfloat16", 1, positions=512, vocab=v) for v in (16384, 65536, 151936)]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, no memory: a smoke test")
    parser.add_argument("--repeats", type=int, default=3, help="steps a side, alternating")
    parser.add_argument("--table", default="", help="only tables whose title holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="compare the loss compiled and step by step")
    parser.add_argument("--alone", action="store_true", help="with --compiled: without TRL's")
    parser.add_argument("--vocab", type=int, default=49152, help="with --compiled: V")
    parser.add_argument(
        "--compiling", action="store_true", help="time the compiler; twice, for a cold and a warm cache"
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        side, case = options.memory_of
        print(added_peak_here(Case(**json.loads(case)), side))
        return
    print(
        f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}, {options.repeats} steps a side."
    )
    if options.compiling:
        compile_times([name for name in DIVERGENCES if options.table.lower() in name])
        return
    if options.compiled:
        cases = [case for case in form_cases(options.quick, options.vocab) if options.table.lower() in case.divergence]
        forms(options.repeats, cases, FORMS[:2] if options.alone else FORMS)
        return
    for title, cases in tables(options.quick):
        if options.table.lower() not in title.lower():
            continue
        print(f"\n### {title}\n\n{HEADER}", flush=True)
        for case in cases:
            print(row(case, options.repeats, memory=not options.quick and sys.platform == "linux"), flush=True)


if __name__ == "__main__":
    main()
