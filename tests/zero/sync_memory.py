"""How much memory a rank takes up while the student's weights are brought to the servers."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.rollouts.vllm.weights import AdapterWeights, AllWeights

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Return the resident bytes of this process."""
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * _PAGE


class _Peak:
    """The most bytes that were resident inside the block, above those at its beginning."""

    def __enter__(self) -> _Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what a step before had freed would be taken up again unseen
        self.before = self.most = resident()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watch.join()
        self.bytes = self.most - self.before

    def _look(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, resident())
            time.sleep(0.001)


@contextmanager
def watching_syncs() -> Iterator[list[dict[str, int]]]:
    """Yield a list with an entry for each sync: bytes above those before, of all of it and of gathering and writing."""
    found: list[dict[str, int]] = []
    sync, score, kinds = ServerEngine.sync, ServerEngine._score, (AllWeights, AdapterWeights)
    writes = [kind.write for kind in kinds]

    def watched(self):
        if self._is_given_up or self.host.step == self.pool.version:
            return
        found.append({})
        with _Peak() as peak:
            sync(self)
        found[-1]["sync"] = peak.bytes

    def scored(self):
        with _Peak() as peak:
            mine = score(self)
        found[-1]["probe"] = peak.bytes
        return mine

    def watching(write):
        def written(self, directory, *, here):
            with _Peak() as peak:
                write(self, directory, here=here)
            found[-1]["write"] = peak.bytes

        return written

    ServerEngine.sync, ServerEngine._score = watched, scored
    for kind, write in zip(kinds, writes, strict=True):
        kind.write = watching(write)
    try:
        yield found
    finally:
        ServerEngine.sync, ServerEngine._score = sync, score
        for kind, write in zip(kinds, writes, strict=True):
            kind.write = write
