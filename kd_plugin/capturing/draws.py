"""Random numbers that depend on the seed and the example alone, never on the batch or the worker."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: int, example_id: str, positions: int, draws: int) -> NDArray[np.float64]:
    """Return uniforms in [0, 1), shape (positions, draws), for the scored positions of an example in order.

    Counter-based (Philox 4x64, keyed by the SHA-256 of seed and example). Raw words are scaled here, since NumPy
    promises the stream of a bit generator for ever, and that of ``Generator.random`` not.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}/{example_id}".encode()).digest()[:16], dtype="<u8")
    words = np.random.Philox(key=key.astype(np.uint64)).random_raw(positions * draws)
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(positions, draws)
