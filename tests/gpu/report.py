"""What a part of the GPU pack is given, and what it hands back."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

GIB = 2**30


@dataclass(frozen=True)
class Place:
    """Where the pack runs: ``cuda`` at full sizes, or ``cpu`` at sizes that show only that it runs."""

    device: str

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def pick(self, full: object, tiny: object) -> object:
        """Return the size for a card, or the tiny one."""
        return full if self.is_gpu else tiny


@dataclass
class Table:
    """One part's results.

    Attributes:
        title: of the table.
        header: names of its columns.
        rows: cells, as they are printed.
        failed: sentences that say which limit was missed, or what could not be measured and should have been.
        notes: sentences below the table.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[object, ...]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", "| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in self.rows]
        lines += [""] + [f"- FAILED: {sentence}" for sentence in self.failed] + [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


@contextmanager
def form(compiled: bool) -> Iterator[None]:
    """Have the panel loss run compiled, or step by step."""
    before = os.environ.get("KD_PLUGIN_COMPILE")
    os.environ["KD_PLUGIN_COMPILE"] = "1" if compiled else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KD_PLUGIN_COMPILE"]
        else:
            os.environ["KD_PLUGIN_COMPILE"] = before


def wait(place: Place) -> None:
    if place.is_gpu:
        torch.cuda.synchronize()


def seconds(place: Place, work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of ``work`` after one call that warms up."""
    found = []
    work()
    for _ in range(repeats):
        wait(place)
        started = time.perf_counter()
        work()
        wait(place)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def added_peak(place: Place, work: Callable[[], object]) -> float:
    """GiB that ``work`` allocates at its highest, beside what was there before; 0 on a CPU, which does not count."""
    if not place.is_gpu:
        work()
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB
