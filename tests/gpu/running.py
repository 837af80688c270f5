"""What a step must not do on a GPU, and what it takes: waiting for the device, offloading, memory against the plan."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.objective import OfflineObjective
from kd_plugin.panel import TeacherPanel, score_rows
from kd_plugin.panel.step import PanelStep
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.memory import Layout, loss_workspace, memory
from kd_plugin.planner.run import PlannedRun, PlannedTeacher
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers import LocalTeacher
from tests.gpu.correctness import HEADS, Inputs, computed, losses
from tests.gpu.report import GIB, Place, Table, added_peak, form, seconds, wait
from tests.gpu.steps import SHAPES, TINY, offline_step, on_policy_step, save


def synchronisation(place: Place) -> Table:
    """Forward and backward of every loss must not wait for the device, after its first use; nor the step's."""
    table = Table("No waiting for the device", ("loss", "waits"))
    n, vocab, width = place.pick((301, 4099, 256), (13, 1031, 16))  # type: ignore[misc]
    inputs = Inputs.draw(torch.bfloat16, n, vocab, width).to(place.device, torch.bfloat16)
    for name, loss in losses().items():
        with form(compiled=place.is_gpu):
            computed(loss, inputs, HEADS["plain"])
            waits = waiting(place, lambda loss=loss: computed(loss, inputs, HEADS["plain"]))  # type: ignore[misc]
        _note(table, name, waits)
    with tempfile.TemporaryDirectory() as directory, form(compiled=place.is_gpu):
        scratch = Path(directory)
        name, shape = next(iter((SHAPES if place.is_gpu else TINY).items()))
        model = save(scratch / "model", shape, int(place.pick(32_000, 300)), 0, place)  # type: ignore[call-overload]
        for kind, owner in (("on-policy", PanelStep), ("offline", OfflineObjective)):
            found = _waits_in_step(place, kind, owner, model, scratch)
            _note(table, f"a micro-batch of the {kind} step, {name}: the loss and the whole backward pass", found)
    return table


def waiting(place: Place, work: Callable[[], object]) -> str:
    """Do ``work``, and say what in it waits for the device; "no" where nothing does."""
    if place.is_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0][:120]
    finally:
        if place.is_gpu:
            torch.cuda.set_sync_debug_mode("default")
    return "no"


def _note(table: Table, name: str, waits: str) -> None:
    table.rows.append((name, waits))
    if waits != "no":
        table.failed.append(f"{name} waits for the device: {waits}")


def _waits_in_step(place: Place, kind: str, owner: type, model: str, scratch: Path) -> str:
    """Run two steps of a trainer; in the second its loss and its backward pass may not wait.

    What the student's own forward pass does, and generation, belong to transformers, and wait.
    """
    if kind == "on-policy":
        rows, tokens = place.pick((4, 16), (2, 4))  # type: ignore[misc]
        step, trainer = on_policy_step(place, model, scratch / kind, rows, tokens)
    else:
        step, trainer = offline_step(place, model, scratch / kind)
    step()
    found: list[str] = []

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            results: list[object] = []
            found.append(waiting(place, lambda: results.append(function(*args, **kwargs))))
            return results[0] if results else function(*args, **kwargs)

        return call

    backward = watched(trainer.accelerator.backward)
    with (
        mock.patch.object(owner, "loss", watched(owner.loss)),
        mock.patch.object(  # type: ignore[attr-defined]
            trainer.accelerator, "backward", backward
        ),
    ):
        step()
    assert len(found) >= 2, f"the {kind} step went another way: {found}"
    return next((one for one in found if one != "no"), "no")


def offloading(place: Place) -> Table:
    """How much of moving an offloaded teacher in and out is hidden behind its work."""
    header = ("teachers", "resident ms", "offloaded ms", "moving alone ms", "hidden")
    table = Table("Offloaded teachers", header)
    shape, vocab = place.pick((SHAPES["0.5B"], 151_936), (TINY["tiny"], 300))  # type: ignore[misc]
    rows, length = place.pick((8, 512), (2, 12))  # type: ignore[misc]
    ids = torch.randint(3, vocab, (rows, length), device=place.device)
    positions = [range(length - 4)] * rows
    with tempfile.TemporaryDirectory() as directory:
        model = save(Path(directory) / "model", shape, vocab, 0, place)
        times = {}
        for placement in ("resident", "offload"):
            teachers = {
                name: LocalTeacher(
                    model, dtype="bfloat16", name=name, placement=placement,  # type: ignore[arg-type]
                    device=place.device if placement == "resident" else None,
                )
                for name in "ab"
            }  # fmt: skip
            panel = TeacherPanel(teachers, combine="weighted_kl")
            assigned = [panel.assign({})] * rows

            def score(panel: TeacherPanel = panel, assigned: list = assigned) -> None:
                score_rows(panel, assigned, ids, torch.ones_like(ids), 4, positions, rows)

            times[placement] = seconds(place, score, repeats=3)

        def move() -> None:
            for teacher in teachers.values():  # those that are offloaded
                with teacher.resident(place.device):
                    wait(place)

        times["moving"] = seconds(place, move, repeats=3)
    hidden = 1.0 - (times["offload"] - times["resident"]) / times["moving"]
    milliseconds = (f"{1e3 * times[key]:.1f}" for key in ("resident", "offload", "moving"))
    table.rows.append((2, *milliseconds, f"{100 * hidden:.0f}%"))
    return table


def planned_memory(place: Place) -> Table:
    """Peak memory of the panel's loss against what ``kd-plugin plan`` counts for it."""
    table = Table(
        "Memory of the loss against kd-plugin plan", ("divergence", "teachers", "N", "peak GiB", "planned GiB", "ratio")
    )
    shape, vocab = place.pick((SHAPES["1.5B"], 151_936), (TINY["tiny"], 300))  # type: ignore[misc]
    positions, width = int(place.pick(8192, 32)), shape["hidden_size"]  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as directory:
        student = architecture(save(Path(directory) / "model", shape, vocab, 0, place))
    for divergence in ("reverse_kl", "jsd"):
        for teachers in (1, 3):
            run = PlannedRun(
                student, "panel", tuple(PlannedTeacher(str(i), student, "sharded") for i in range(teachers)),
                micro_batch=1, prompt_length=0, completion_length=positions, combine="weighted_kl",
                divergence=divergence,
            )  # fmt: skip
            planned = loss_workspace(run, 0, place.device) / GIB

            def draw(*shape: int) -> torch.Tensor:
                return torch.randn(shape, dtype=torch.bfloat16, device=place.device)

            hidden, weight = draw(positions, width).requires_grad_(), draw(vocab, width).requires_grad_()
            terms = tuple(
                TeacherTerm(HiddenSignal(draw(positions, width), OutputHead(draw(vocab, width))))
                for _ in range(teachers)
            )

            step = partial(
                fused_panel_divergence, hidden, OutputHead(weight), [PanelGroup(None, terms)], Divergence(divergence)
            )
            with form(compiled=place.is_gpu):
                step()
                peak = added_peak(place, step)
            ratio = peak / planned
            table.rows.append((divergence, teachers, positions, f"{peak:.2f}", f"{planned:.2f}", f"{ratio:.2f}"))
            if place.is_gpu and not 0.7 <= ratio <= 1.05:
                table.failed.append(
                    f"{divergence} with {teachers} teachers took {peak:.2f} GiB; planned {planned:.2f}."
                )
    return table


def planned_step(place: Place) -> Table:
    """Peak memory of on-policy steps in float32, optimizer and teacher included, against the plan of one GPU."""
    table = Table(
        "Memory of a run against kd-plugin plan", ("model", "rows", "tokens", "peak GiB", "planned GiB", "ratio")
    )
    name, shape = next(iter((SHAPES if place.is_gpu else TINY).items()))
    vocab, rows, tokens = place.pick((151_936, 4, 256), (300, 2, 4))  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        model = save(Path(directory) / "model", shape, vocab, 0, place)
        student, layout = architecture(model), Layout(0, checkpointing=False)
        run = PlannedRun(
            student, "panel", (PlannedTeacher("t", student, "resident"),), micro_batch=rows, accumulation=1,
            prompt_length=32, completion_length=tokens, precision="fp32", combine="weighted_kl",
        )  # fmt: skip
        planned = memory(run, layout, 1).peak / GIB

        def work() -> None:
            step, _ = on_policy_step(place, model, Path(directory) / "run", rows, tokens, "float32")
            step()
            step()

        with form(compiled=place.is_gpu):
            peak = added_peak(place, work)
    table.rows.append((name, rows, tokens, f"{peak:.2f}", f"{planned:.2f}", f"{peak / planned:.2f}"))
    if place.is_gpu and peak > 1.05 * planned:
        table.failed.append(f"The run took {peak:.2f} GiB; planned {planned:.2f}.")
    return table


def compiling(place: Place) -> Table:
    """Seconds until the loss is compiled, in this process, with whatever Inductor's cache holds."""
    table = Table("Compiling", ("divergence", "first call s", "later calls s"))
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        vocab, width = place.pick((32_003, 512), (131, 16))  # type: ignore[misc]
        hidden = torch.randn(64, width, device=place.device, requires_grad=True)
        weight = torch.randn(vocab, width, device=place.device, requires_grad=True)
        terms = (TeacherTerm(HiddenSignal(hidden.detach() + 1, OutputHead(weight.detach()))),)
        times = []
        with form(compiled=place.is_gpu):
            for _ in range(2):
                wait(place)
                started = time.perf_counter()
                groups = [PanelGroup(None, terms)]
                fused_panel_divergence(hidden, OutputHead(weight), groups, Divergence(divergence)).loss_sum.backward()
                wait(place)
                times.append(time.perf_counter() - started)
        table.rows.append((divergence, f"{times[0]:.2f}", f"{times[1]:.4f}"))
    return table
