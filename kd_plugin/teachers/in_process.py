"""What teachers in this process have in common: a forward pass that a host may wrap, and hidden states as signal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.lineage.sources import Source
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers.base import Capabilities
from kd_plugin.vocab import Vocabulary


class InProcessTeacher(ABC):
    """A teacher whose weights are here; a subclass says which model it is, and which part of it is the backbone."""

    name: str

    def __init__(self) -> None:
        self._call: Callable[..., Tensor] = _call_directly
        self.is_attached = False

    @property
    @abstractmethod
    def source(self) -> Source:
        """What this teacher is, and under which terms."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this teacher gives and needs."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model, in evaluation mode; loaded on first use."""

    @property
    @abstractmethod
    def head(self) -> OutputHead:
        """The model's output head."""

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The token ids that this teacher speaks."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""

    @abstractmethod
    def stay_on(self, device: torch.device | None) -> None:
        """Have the weights on a device from now on: the one that the user chose, else ``device``."""

    def attach(self, call: Callable[..., Tensor]) -> None:
        """Let a host run the forward pass inside its own wrapper (DDP, FSDP, a DeepSpeed engine).

        Args:
            call: called as ``call(method, *args)``; must return ``method(*args)``, with sharded parameters
                gathered while it runs.
        """
        self._call = call
        self.is_attached = True

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states (B, L, H) of a batch (B, L), after the final norm."""
        self.model.eval()
        return self._call(self._run_backbone, input_ids, attention_mask)

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> HiddenSignal:
        """Judge the next token at ``positions``; see :meth:`~kd_plugin.teachers.base.Teacher.score`."""
        hidden = self.hidden_states(input_ids, attention_mask)
        return HiddenSignal(hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), self.head)

    @property
    @abstractmethod
    def _backbone(self) -> Any:
        """The model without its output head."""

    def _run_backbone(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _call_directly(method: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return method(*inputs)
