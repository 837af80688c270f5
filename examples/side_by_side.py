"""Trainings of an experiment side by side, each done once; what is finished is on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch


def workers(count: int) -> ProcessPoolExecutor:
    """Return processes that each have their share of the cores, and end with this one."""
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin_worker, initargs=(count,))


def _begin_worker(count: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, and write where the next run does."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"sizes", "found"} <= set(content):
        raise SystemExit(f"{path} is no file of results of this version. Choose another --output_dir.")
    return content


class Results:
    """What each job found, by name, on disk after each one.

    Args:
        path: of the file.
        sizes: of the experiment; a file of other ones is refused, as is one of an earlier version.
    """

    def __init__(self, path: Path, sizes: Mapping[str, Any] | None = None) -> None:
        self.path, self.sizes = path, json.loads(json.dumps(dict(sizes or {})))
        content = _read(path) if path.exists() else {"sizes": self.sizes, "found": {}}
        if content["sizes"] != self.sizes:
            raise SystemExit(f"{path} is of other sizes: {content['sizes']}. Choose another --output_dir.")
        self.found: dict[str, Any] = content["found"]

    def fill(
        self,
        pool: Executor,
        jobs: Mapping[str, Callable[[], Any]],
        after: Callable[[Mapping[str, Any]], Any] = lambda found: None,
        says: Callable[[Any], Any] = lambda found: found,
    ) -> None:
        """Do the jobs that have no result yet, and write and say each result as it comes.

        Args:
            pool: does them.
            jobs: by name, what returns plain values.
            after: is told all results after each one.
            says: makes of a result what is printed.
        """
        running = {pool.submit(job): name for name, job in jobs.items() if name not in self.found}
        for future in as_completed(running):
            name = running[future]
            self.found[name] = future.result()
            whole = self.path.with_suffix(".part")
            whole.write_text(json.dumps({"sizes": self.sizes, "found": self.found}))
            whole.replace(self.path)
            print(f"{name}: {says(self.found[name])}", flush=True)
            after(self.found)
