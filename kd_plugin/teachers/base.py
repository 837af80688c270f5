"""What every teacher can do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from kd_plugin.lineage.sources import Source
from kd_plugin.signals import HiddenSignal, SparseSignal
from kd_plugin.vocab import Vocabulary


@runtime_checkable
class Teacher(Protocol):
    """A model that judges tokens. How it is reached never matters to the loss.

    Shape suffixes: B rows, L tokens, N scored positions.
    """

    @property
    def source(self) -> Source:
        """What this teacher is and under which terms; known before anything is loaded."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids that this teacher speaks; needs the tokenizer, not the weights."""
        ...

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> HiddenSignal | SparseSignal:
        """Judge the next token at some positions.

        Args:
            input_ids: (B, L) int64 token ids, padded on either side.
            attention_mask: (B, L) 1 for tokens, 0 for padding.
            positions: (N,) int64 indices into the flattened (B * L); position ``b * L + t`` is the
                distribution over token ``t + 1`` of row ``b``.

        Returns:
            The signal at the N positions, in their order.
        """
        ...
