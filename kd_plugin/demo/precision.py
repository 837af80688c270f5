"""In which dtype the demo computes."""

from __future__ import annotations

import torch

# Vector instructions without a bfloat16 product: there it is emulated, several times slower than float32
_NO_BFLOAT16 = frozenset({"AVX2", "DEFAULT", "NO AVX"})


def fast_dtype() -> str:
    """Return ``bfloat16`` where this CPU multiplies it natively, else ``float32``, which takes more memory."""
    return "float32" if torch.backends.cpu.get_cpu_capability() in _NO_BFLOAT16 else "bfloat16"
