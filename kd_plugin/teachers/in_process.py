"""What teachers in this process have in common: a forward pass that a host may wrap, and hidden states as signal.

A host offers them a :class:`Placement`. Several teachers, or a teacher and the student, share one model's tensors
through module trees of their own.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.lineage.sources import Source
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers.base import Capabilities, Teacher
from kd_plugin.upstream import forget_adapters, own_parameters
from kd_plugin.vocab import Vocabulary


@dataclass(frozen=True)
class Placement:
    """What a host offers to the teachers of this process.

    Attributes:
        student: the base of adapters that have none of their own; of a PEFT model that model itself.
        vocabulary: of the student.
        device: that the student computes on.
        wrap: puts a frozen model where a resident teacher is, replicated or sharded, and returns the module whose
            forward pass runs it there, which may be the model itself.
        shards_move: whether ``wrap`` shards models in parts that may rest in host memory; if not, an offloaded teacher
            waits there in full.
        student_is_sharded_later: whether the student, not sharded now, will be when training starts.
        placed: teachers that have their place already; several adapters may share one base.
    """

    student: Any
    vocabulary: Vocabulary
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]
    shards_move: bool = False
    student_is_sharded_later: bool = False
    placed: list[Teacher] = field(default_factory=list)


def place(teachers: Iterable[Teacher], placement: Placement) -> None:
    """Load the teachers that run in this process, and have each be where the host has it.

    A teacher with ``placement="offload"`` has what a rank holds of it in host memory while it does not score. An
    adapter runs over its base as that is placed. A teacher without a method ``place`` looks after itself.

    Raises:
        ConfigError: a teacher without a head, an adapter that does not fit its base or cannot run over shards.
    """
    for teacher in teachers:
        own = getattr(teacher, "place", None)
        if own is not None and not any(teacher is one for one in placement.placed):
            placement.placed.append(teacher)
            own(placement)


def tree_over_same_tensors(model: nn.Module) -> nn.Module:
    """Copy the modules of ``model``, and none of its parameters: both trees hold the same ones.

    What a wrapper put on the modules of ``model`` stays theirs: hooks, FSDP2's state, and the classes that it gives
    them. The copy of a model that is sharded over ranks must gather for itself, see
    :func:`~kd_plugin.sharding.gather_as_it_runs`.
    """
    with _without_fsdp2(model):
        memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        for module in model.modules():
            # torch 2.13: what FSDP2 knows of a module is in its attributes too
            theirs = [v for k, v in vars(module).items() if "_hooks" in k or k.startswith("__composable_api_state")]
            memo |= {id(kept): type(kept)() for kept in theirs if isinstance(kept, dict)}
        return copy.deepcopy(model, memo)


@contextmanager
def _without_fsdp2(model: nn.Module) -> Iterator[None]:
    """Give modules that FSDP2 sharded their own classes back inside the block; FSDP2's refuse to be copied."""
    if not torch.distributed.is_available():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    classes = [type(module) for module in sharded]
    for module in sharded:
        module.reshard()  # after a pass some hold gathered tensors, which are no one's parameters
    try:
        for module in sharded:
            module.__class__ = next(kind for kind in type(module).__bases__ if kind is not FSDPModule)
        yield
    finally:
        for module, kind in zip(sharded, classes, strict=True):
            module.__class__ = kind


@contextmanager
def plain_stand_ins(tree: nn.Module) -> Iterator[None]:
    """Have empty tensors of their shapes in the place of parameters that FSDP2 sharded, inside the block.

    PEFT (0.21) takes a DTensor for one of tensor parallelism, and would make its layers for the local part.
    """
    held = own_parameters(tree.modules())
    sharded = [(parameters, name, p) for parameters, name, p in held if hasattr(p, "full_tensor")]
    for parameters, name, p in sharded:
        stand_in = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
        parameters[name] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for parameters, name, p in sharded:
            parameters[name] = p


def without_adapters(model: nn.Module) -> nn.Module:
    """Take the layers of adapters out of a tree, leaving the layers that they wrap."""
    for name, module in list(model.named_modules()):
        inner = None
        if is_tuner(module):
            inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module
        if inner is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, inner)
    if hasattr(model, "peft_config"):
        del model.peft_config
    forget_adapters(model)
    return model


def with_plain_head(model: nn.Module) -> Any:
    """Return what :meth:`OutputHead.from_model` reads of a model, with an adapter's change of the head merged in."""
    module = model.get_output_embeddings()  # type: ignore[operator]
    if not is_tuner(module):
        return model
    if hasattr(module, "get_base_layer"):
        own = copy.deepcopy(module)
        own.merge()
        plain = own.get_base_layer()
    else:
        plain = module.modules_to_save[module.active_adapters[0]]
    return SimpleNamespace(config=model.config, get_output_embeddings=lambda: plain)


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer that PEFT put around another."""
    if "peft" not in sys.modules:  # then nothing made one
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


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

    @property
    def max_length(self) -> int | None:
        """Tokens that the model has positions for; None where its configuration does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
        return found if isinstance(found, int) and found > 0 else None

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
        """Score the next token at ``positions``; see :meth:`~kd_plugin.teachers.base.Teacher.score`."""
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
