"""The student's forward pass while a training step runs: it also computes the distillation loss.

The loss is formed inside the model's own ``forward``, where every wrapper (DDP, FSDP2, ZeRO-3) has the head's weight
gathered. Where a step returns the model's own cross-entropy untouched, both losses come from one projection and the
logits are never formed; a step that does more with its loss or logits keeps them, and pays for a second projection.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kd_plugin.signals import OutputHead

_NOT_OF_THE_BACKBONE = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict")


@dataclass
class StudentOutput(ModelOutput):
    """What the student answers where logits need not be formed: they are computed when somebody asks for them.

    Attributes:
        loss: mean cross-entropy of the labels, in nats; without a graph.
        loss_sum: what is trained on, with its graph: FSDP2 readies a module's backward pass by what its forward pass
            returned, and a model whose only FSDP2 unit is its root would not train without.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["logits_from"] = None

    @property
    def logits(self) -> Tensor:
        """The logits (B, L, V), computed now."""
        head, hidden = self.__dict__["logits_from"]
        return head.logits(hidden)

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        return (self.loss, self.logits)[key] if isinstance(key, int | slice) and key != 0 else super().__getitem__(key)


class Objective(Protocol):
    """What a forward pass can be asked to compute; :class:`~kd_plugin.divergence.objective.OfflineObjective` is one."""

    @property
    def ce_weight(self) -> float:
        """Weight of the module's own loss."""
        ...

    @property
    def forms_own(self) -> bool:
        """Whether ``loss`` can form the labels' cross-entropy in the same pass."""
        ...

    def without_own(self) -> Objective:
        """Return the same objective without the cross-entropy, which the module then computes itself."""
        ...

    def loss(self, hidden: Tensor, head: OutputHead, target: Any) -> Any:
        """Return an object with ``loss_sum``, a scalar with a graph; see ``SparseLoss``."""
        ...


@dataclass
class Call:
    """One training step: what the student's forward pass is to compute, and what it found.

    Attributes:
        target: of the objective.
        labels: (B, L) the batch's labels, or None.
        shape: (B, L) of the batch.
        joint: form both losses in one projection, and no logits.
        found: the objective's loss, once it is computed.
        own: what the student returned as its own loss in a joint pass.
    """

    target: Any
    labels: Tensor | None
    shape: tuple[int, ...]
    joint: bool
    found: Any = None
    own: Tensor | None = None


class DistillingForward:
    """Patches one student's ``forward``; outside of :meth:`step` it changes nothing.

    Args:
        model: the student, of a PEFT model its base.
        vocab_size: number of real tokens; output rows beyond are padding.
        objective: what is minimised.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, objective: Objective) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.objective = objective
        self._apart_objective = objective.without_own()
        self._call: Call | None = None
        self._inner = model.forward
        self._signature = inspect.signature(type(model).forward)
        # A trainer may compile the student; the backbone then is compiled, and this function and the loss are not
        eager = torch.compiler.disable(self._forward, recursive=False)

        def forward(_model: Any, *args: Any, **kwargs: Any) -> Any:
            return eager(*args, **kwargs)

        # `generate` validates its arguments against the signature
        forward.__signature__ = self._signature  # type: ignore[attr-defined]
        model.forward = types.MethodType(forward, model)

    def remove(self) -> None:
        """Give the student its own ``forward`` back."""
        self.model.forward = self._inner

    @contextmanager
    def step(self, call: Call) -> Iterator[None]:
        """Let the next forward pass over the batch's shape compute ``call.found``."""
        self._call = call
        try:
            yield
        finally:
            self._call = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None or call.found is not None:
            return self._inner(*args, **kwargs)
        given = dict(self._signature.bind(self.model, *args, **kwargs).arguments)
        given.pop("self", None)
        given.update(given.pop("kwargs", {}))
        first = given.get("input_ids")
        first = given.get("inputs_embeds") if first is None else first
        if first is None or tuple(first.shape[:2]) != call.shape:
            return self._inner(*args, **kwargs)
        labels = given.get("labels")
        same_labels = labels is not None and labels is call.labels
        objective = self.objective
        if not call.joint or not (objective.ce_weight == 0.0 or (same_labels and objective.forms_own)):
            return self._apart(call, args, kwargs)
        inputs = {name: value for name, value in given.items() if name not in _NOT_OF_THE_BACKBONE}
        hidden = self.model.base_model(**{**inputs, "use_cache": False}).last_hidden_state
        head = OutputHead.from_model(self.model, self.vocab_size)
        call.found = self.objective.loss(hidden, head, call.target)
        if labels is not None:
            call.own = call.found.own_mean()
        output = StudentOutput(loss=call.own, loss_sum=call.found.loss_sum)
        output.__dict__["logits_from"] = (head, hidden)
        return output

    def _apart(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Run the model as it is, and compute the divergence from the hidden states that pass by."""
        seen: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        try:
            output = self._inner(*args, **kwargs)
        finally:
            hook.remove()
        head = OutputHead.from_model(self.model, self.vocab_size)
        call.found = self._apart_objective.loss(seen[0], head, call.target)
        return output
