"""Module trees over another model's tensors, so that several teachers, or a teacher and the student, share them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def tree_over_same_tensors(model: nn.Module) -> nn.Module:
    """Copy the modules of ``model``, and none of its parameters: both trees hold the same ones.

    What a wrapper put on the modules of ``model`` stays theirs: hooks, FSDP2's state, and the classes that it gives
    them. The copy of a model that is cut over ranks must gather for itself, see
    :func:`~kd_plugin.sharding.gathering.gather_as_it_runs`.
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
    """Give modules that FSDP2 cut their own classes back inside the block; FSDP2's refuse to be copied."""
    if not torch.distributed.is_available():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    cut = [module for module in model.modules() if isinstance(module, FSDPModule)]
    classes = [type(module) for module in cut]
    for module in cut:
        module.reshard()  # after a pass some hold whole tensors, which are no one's parameters
    try:
        for module in cut:
            module.__class__ = next(kind for kind in type(module).__bases__ if kind is not FSDPModule)
        yield
    finally:
        for module, kind in zip(cut, classes, strict=True):
            module.__class__ = kind


@contextmanager
def plain_stand_ins(tree: nn.Module) -> Iterator[None]:
    """Have empty tensors of their shapes in the place of parameters that FSDP2 cut, inside the block.

    PEFT (0.21) takes a DTensor for one of tensor parallelism, and would make its layers for the local part.
    """
    held = [(m._parameters, k, p) for m in tree.modules() for k, p in m._parameters.items() if p is not None]
    cut = [(parameters, name, p) for parameters, name, p in held if hasattr(p, "full_tensor")]
    for parameters, name, p in cut:
        stand_in = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
        parameters[name] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for parameters, name, p in cut:
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
    model._hf_peft_config_loaded = False  # type: ignore[assignment]
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
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
