"""The student's forward pass while a training step runs: it also computes the distillation loss.

The loss is formed inside the model's own ``forward``, where every wrapper (DDP, FSDP2, ZeRO-3) has the head's weight
gathered, and it leaves through the model's output: a wrapper gathers weights for the backward pass by what the forward
pass returned. Where a step returns the model's own cross-entropy untouched, both losses come from one projection and
the logits are never formed; a step that does more with its loss or logits keeps them, and pays for a second projection.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kd_plugin.sharding import gathered_heads
from kd_plugin.signals import OutputHead, refuse_adapted_head

_NOT_OF_THE_BACKBONE = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict")
_TRAINED = "kd_loss"  # the name in the student's output under which the loss leaves
# What wrappers put between a loss that the student returned and the same loss in a module's step
_WRAPPERS_NODES = (
    "AliasBackward0", "CloneBackward0", "PreBackwardFunctionForModuleBackward", "ToCopyBackward0", "_DDPSinkBackward",
)  # fmt: skip


@dataclass
class StudentOutput(ModelOutput):
    """What the student answers where logits need not be formed: they are computed when somebody asks for them.

    Attributes:
        loss: mean cross-entropy of the labels, in nats; its gradient is that of ``kd_loss``, times zero.
        kd_loss: what is trained on, with its graph.
    """

    loss: Tensor | None = None
    kd_loss: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["logits_from"] = None

    @property
    def logits(self) -> Tensor:
        """The logits (B, L, V), computed now."""
        head, hidden = self.__dict__["logits_from"]
        with gathered_heads([head]) as (opened,):
            return opened.logits(hidden)

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
        normalizer: scalar, what sums over this micro-batch's tokens are divided by; None in validation, where the
            student's own loss stays its mean.
        found: the objective's loss, once it is computed.
        trained: ``found.loss_sum`` over the normalizer, as the outermost wrapper of the student returned it.
        own: in a joint pass the autograd node of what the student returned as its own loss; None in any other.
        as_tuple: whether the caller asked the student for a tuple.
    """

    target: Any
    labels: Tensor | None
    shape: tuple[int, ...]
    joint: bool
    normalizer: Tensor | None = None
    found: Any = None
    trained: Tensor | None = None
    own: Any = None
    as_tuple: bool = False

    def is_own(self, loss: Any) -> bool:
        """Whether ``loss`` is what a joint pass returned, at most passed on by wrappers, which make copies of it."""
        node = getattr(loss, "grad_fn", None)
        while node is not None and node is not self.own:
            passed = type(node).__name__ in _WRAPPERS_NODES
            node = node.next_functions[0][0] if passed else None
        return node is not None


class DistillingForward:
    """Patches one student's ``forward``; outside of :meth:`step` it changes nothing.

    Args:
        model: the student, of a PEFT model its base.
        vocab_size: number of real tokens; output rows beyond are padding.
        objective: what is minimised.
        within: the module that holds the student. Its parts around the student are wrappers, set up already.

    Raises:
        ConfigError: an adapter changes the student's output head.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, objective: Objective, within: nn.Module) -> None:
        refuse_adapted_head(model.get_output_embeddings())
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
        # DeepSpeed's hooks return copies that gather weights for the backward pass; ours come after them
        leaves = torch.compiler.disable(self._leaves)
        around = [m for m in within.modules() if m is not within and any(part is model for part in m.modules())]
        self._hooks = [module.register_forward_hook(leaves) for module in around]

    def remove(self) -> None:
        """Give the student its own ``forward`` back."""
        self.model.forward = self._inner
        for hook in self._hooks:
            hook.remove()

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
        as_dict = given.get("return_dict")
        call.as_tuple = not (self.model.config.return_dict if as_dict is None else as_dict)
        if call.as_tuple:
            kwargs = {**kwargs, "return_dict": True}  # the loss needs a name; `_leaves` makes the tuple
        objective = self.objective
        joint = objective.ce_weight == 0.0 or (objective.forms_own and _same(labels, call.labels))
        if not call.joint or not joint or self._asks_for_router(given):
            return self._apart(call, args, kwargs, labels)
        inputs = {name: value for name, value in given.items() if name not in _NOT_OF_THE_BACKBONE}
        hidden = self.model.base_model(**{**inputs, "use_cache": False}).last_hidden_state
        head = OutputHead.from_model(self.model, self.vocab_size)
        with gathered_heads([head]) as (opened,):
            call.found = self.objective.loss(hidden, opened, call.target)
        call.trained = _normalized(call)
        shown = None if labels is None else call.found.own_mean()
        if shown is not None:
            shown = beside(shown, call.trained)
            call.own = shown.grad_fn
        output = StudentOutput(loss=shown, kd_loss=call.trained)
        output.__dict__["logits_from"] = (head, hidden)
        return output

    def _asks_for_router(self, given: Mapping[str, Any]) -> bool:
        """Whether the model's own loss has a part that no projection gives: the router loss of a mixture of experts."""
        asked = given.get("output_router_logits")
        config = self.model.config.get_text_config()
        return bool(getattr(config, "output_router_logits", False) if asked is None else asked)

    def _apart(self, call: Call, args: Any, kwargs: Any, labels: Tensor | None) -> Any:
        """Run the model as it is, and compute the divergence from the hidden states that pass by.

        The model's own loss, a mean over its labels, becomes this micro-batch's share of the mean over all of them.
        """
        seen: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        try:
            output = self._inner(*args, **kwargs)
        finally:
            hook.remove()
        with gathered_heads([OutputHead.from_model(self.model, self.vocab_size)]) as (head,):
            call.found = self._apart_objective.loss(seen[0], head, call.target)
        call.trained = _normalized(call)
        output[_TRAINED] = call.trained
        loss = output.get("loss")
        if loss is not None:
            if call.normalizer is not None and labels is not None:
                loss = loss * ((labels[..., 1:] != -100).sum() / call.normalizer).to(loss)
            output["loss"] = beside(loss, call.trained)
        return output

    def _leaves(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Note what a wrapper returned as the loss; the outermost one comes last."""
        call = self._call
        if call is None or call.found is None or not isinstance(output, Mapping):
            return output
        passed = output.get(_TRAINED)
        if passed is None:
            return output
        call.trained = passed
        if not call.as_tuple or module is not self.model:
            return output
        if isinstance(output, StudentOutput):
            return tuple(value for value in (output.loss, output.logits) if value is not None)
        return tuple(value for name, value in output.items() if name != _TRAINED)


class _Beside(torch.autograd.Function):
    """The first value; the second has a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (other,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(other)


def beside(value: Tensor, other: Tensor) -> Tensor:
    """Return ``value``, a scalar, whose backward pass also goes through that of ``other``, with nothing to add.

    So a wrapper that readies itself in the backward pass of either does so whichever is trained on.
    """
    return _Beside.apply(value, other)  # type: ignore[no-any-return, no-untyped-call]


def _normalized(call: Call) -> Tensor:
    loss_sum: Tensor = call.found.loss_sum
    return loss_sum if call.normalizer is None else loss_sum / call.normalizer.to(loss_sum.device)


def _same(labels: Tensor | None, others: Tensor | None) -> bool:
    """Whether two tensors hold the same labels; wrappers and steps may copy them."""
    if labels is None or others is None:
        return False
    return labels is others or (labels.device == others.device and torch.equal(labels, others))
