"""One check, so that a NaN stops a run and is never masked."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugin.errors import NonFiniteError


def require_finite(loss: Tensor, where: str) -> None:
    """Raise unless every element of ``loss`` is finite.

    Reading the answer waits for the device. The losses of this room call it themselves only on CPU, where waiting
    costs nothing; on an accelerator the host calls it when it reads the loss anyway, for its log.

    Args:
        loss: any tensor.
        where: what the message calls it, such as ``"the panel loss at step 12"``.

    Raises:
        NonFiniteError: an element is NaN or infinite.
    """
    if bool(torch.isfinite(loss.detach()).all()):
        return
    bad = loss.detach().flatten()
    bad = bad[~torch.isfinite(bad)]
    raise NonFiniteError(
        f"{where} is not finite: {bad.numel()} of {loss.numel()} values, the first is {bad[0].item()}. Look at the "
        "student's and the teacher's last hidden states for NaN or infinity; lower the learning rate, clip "
        "gradients, or use bfloat16 instead of float16."
    )
