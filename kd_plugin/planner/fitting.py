"""Which ZeRO stage and offload fits, and which of those is fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kd_plugin.errors import ConfigError
from kd_plugin.planner.cluster import Cluster
from kd_plugin.planner.memory import Layout, Memory, memory
from kd_plugin.planner.run import PlannedRun
from kd_plugin.planner.time import StepTime, step_time

_OFFLOADS = {
    1: (("none", "none"), ("cpu", "none")),
    2: (("none", "none"), ("cpu", "none")),
    3: (("none", "none"), ("cpu", "none"), ("cpu", "cpu"), ("nvme", "nvme")),
}
LAYOUTS = tuple(
    Layout(stage, *offload, checkpointing=checkpointing)
    for stage in (0, 1, 2, 3)
    for offload in _OFFLOADS.get(stage, (("none", "none"),))
    for checkpointing in (False, True)
)


@dataclass(frozen=True)
class Option:
    """One layout with what it takes.

    Attributes:
        layout: stage, offload and checkpointing.
        run: the run, with generation gathered or not.
        memory: bytes on a GPU.
        seconds: estimated time of an optimizer step.
        verdict: empty where it fits, else what does not.
    """

    layout: Layout
    run: PlannedRun
    memory: Memory
    seconds: StepTime
    verdict: str

    @property
    def fits(self) -> bool:
        """Whether everything is within what the machines have."""
        return not self.verdict


def options(run: PlannedRun, cluster: Cluster, layouts: Sequence[Layout] = LAYOUTS) -> list[Option]:
    """Judge every layout.

    Where whole weights do not fit under ZeRO-3, generation falls back to layers that are gathered one by one.

    Returns:
        One option a layout, in the order of ``layouts``.
    """
    return [_judge(run, layout, cluster) for layout in layouts]


def recommended(found: Sequence[Option]) -> Option | None:
    """Return the fastest option that fits; among equals the lowest stage, which has the fewest moving parts."""
    return min((o for o in found if o.fits), key=lambda o: (round(o.seconds.total, 3), o.layout.stage), default=None)


def require_possible(run: PlannedRun, layout: Layout) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: offloaded weights below stage 3, an adapter teacher on a base that is trained.
    """
    if layout.stage not in (0, 1, 2, 3):
        raise ConfigError(f"There is no ZeRO stage {layout.stage}; expected 0, 1, 2 or 3.")
    if layout.offload_parameters != "none" and layout.stage != 3:
        raise ConfigError(
            f"offload_parameters is {layout.offload_parameters!r} with ZeRO-{layout.stage}, which keeps whole weights "
            "on each GPU. Weights are offloaded under stage 3 only; offload the optimizer, or choose stage 3."
        )
    if layout.offload_optimizer != "none" and layout.stage == 0:
        raise ConfigError("offload_optimizer needs ZeRO-1, 2 or 3; stage 0 has nothing cut that could be moved away.")
    if run.placed("adapter") and run.student.total == run.student.trainable:
        raise ConfigError(
            "An adapter teacher sits on the student's frozen base, but the full student is trained and its base "
            "moves. Train LoRA (lora_rank), or give the teacher a base of its own (sharded, resident or offload)."
        )


def _judge(run: PlannedRun, layout: Layout, cluster: Cluster) -> Option:
    require_possible(run, layout)
    held = memory(run, layout, cluster.ranks)
    if layout.stage == 3 and run.method == "panel" and held.writing > cluster.usable:
        run = replace(run, gather_for_generation=False)
        held = memory(run, layout, cluster.ranks)
    return Option(layout, run, held, step_time(run, layout, held, cluster), _verdict(held, layout, cluster))


def _verdict(held: Memory, layout: Layout, cluster: Cluster) -> str:
    gib = 1024**3
    if held.peak > cluster.usable:
        what = "training" if held.training >= held.peak else "generation"
        return f"{what} needs {held.peak / gib:.1f} GiB, {cluster.usable / gib:.1f} can be used"
    share = (
        cluster.nvme_share if "nvme" in (layout.offload_optimizer, layout.offload_parameters) else cluster.host_share
    )
    if held.host > share:
        return f"offload needs {held.host / gib:.0f} GiB for each GPU beside it, there are {share / gib:.0f}"
    return ""
