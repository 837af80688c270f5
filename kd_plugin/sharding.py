"""Models whose weights are sharded over ranks: gathering parameters, and teachers that are never trained.

All ranks take part in each gathering, in one order. Teachers are sharded by DeepSpeed ZeRO-3 whatever stage the student
trains under, or by FSDP2; :func:`through` runs a method of a model that a wrapper gathers.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kd_plugin.upstream import own_parameters, swap_deepspeed_config

_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
Head = TypeVar("Head", bound=Any)  # a frozen dataclass with `weight` and `bias`
_SWAP_DIRECTORIES = itertools.count()  # one a model that DeepSpeed may keep on NVMe
# What belongs to training, and would make DeepSpeed build an optimizer for a model that has none
_TRAINING_ONLY = ("optimizer", "scheduler", "gradient_clipping", "zero_allow_untested_optimizer")


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass gathers parameters from other ranks (DeepSpeed ZeRO-3 or FSDP2).

    A model that is loaded under ZeRO-3 is sharded from the start; one that a host wraps is afterwards.
    """
    return any(hasattr(p, "ds_status") or hasattr(p, "full_tensor") for p in model.parameters())


def gathering(parameters: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return a block in which the ZeRO-3 parameters among ``parameters`` are gathered; a collective call.

    Those that are gathered already (a tied embedding may be held open by another block) are left to whoever holds them.
    """
    sharded = list({id(p): p for p in parameters if hasattr(p, "ds_status")}.values())
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    apart = [p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(apart) if apart else nullcontext()  # type: ignore[no-any-return]


def gathered_tensor(tensor: Any) -> Any:
    """Return an ordinary tensor for a DTensor, gathered now, inside autograd; others unchanged. A collective call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def replicated_models() -> Iterator[None]:
    """Let transformers build and read models replicated, all of each on every rank, inside the block.

    Under ZeRO-3 it shards every model that it makes, one on the meta device too, which fails. Under FSDP with
    CPU-efficient loading it reads the weights on the first rank of a node alone, and trusts that a wrapper sends them
    to the others: a teacher of theirs would be noise.
    """
    config, efficient = swap_deepspeed_config(None), os.environ.get(_EFFICIENT)
    os.environ[_EFFICIENT] = "false"
    try:
        yield
    finally:
        swap_deepspeed_config(config)
        os.environ.pop(_EFFICIENT)
        if efficient is not None:
            os.environ[_EFFICIENT] = efficient


@contextmanager
def swapped_apart() -> Iterator[None]:
    """Let a model that is loaded inside the block under ZeRO-3 have a directory of its own on NVMe, if it goes there.

    DeepSpeed 0.19 empties the directory of parts whenever a further model begins to use it: a teacher in the student's
    would delete the student.
    """
    from transformers.integrations.deepspeed import deepspeed_config

    offload = ((deepspeed_config() or {}).get("zero_optimization") or {}).get("offload_param") or {}
    if offload.get("device") != "nvme":
        yield
        return
    shared = offload["nvme_path"]
    offload["nvme_path"] = str(Path(shared) / f"model{next(_SWAP_DIRECTORIES)}")
    try:
        yield
    finally:
        offload["nvme_path"] = shared


def gather_as_it_runs(model: nn.Module) -> None:
    """Let each layer of ``model`` be gathered while it runs, where its parameters are sharded, and no longer.

    For a module tree over parameters that another tree shards: a wrapper's own hooks belong to that other tree. Every
    rank must run the tree at the same time. Layers are those of the outermost ``ModuleList``; nothing is fetched
    ahead, so a pass takes longer than a wrapper's own.
    """
    layers = outermost_layers(model)
    within = {id(module) for layer in layers for module in layer.modules()}
    leaves = [m for m in model.modules() if id(m) not in within and next(m.parameters(recurse=False), None) is not None]
    for module in [*layers, *leaves]:
        _gather_around(module, recurse=id(module) in within)


def outermost_layers(model: nn.Module) -> list[nn.Module]:
    """Return the children of each ``ModuleList`` of ``model`` that lies in no other: a transformer's layers."""
    found: list[nn.Module] = []
    waiting = [model]
    while waiting:
        for child in waiting.pop().children():
            if isinstance(child, nn.ModuleList):
                found += list(child)
            else:
                waiting.append(child)
    return found


def _gather_around(module: nn.Module, *, recurse: bool) -> None:
    open_blocks: list[AbstractContextManager[Any]] = []

    def before(_: nn.Module, __: Any) -> None:
        block = _gathered(module.modules() if recurse else [module])
        block.__enter__()
        open_blocks.append(block)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        open_blocks.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


@contextmanager
def _gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have the parameters that ``modules`` own themselves gathered inside the block; a collective call."""
    owned = own_parameters(modules)
    with gathering([p for _, _, p in owned]):
        sharded = [(parameters, name, p) for parameters, name, p in owned if hasattr(p, "full_tensor")]
        for parameters, name, p in sharded:
            parameters[name] = gathered_tensor(p)
        try:
            yield
        finally:
            for parameters, name, p in sharded:
                parameters[name] = p


def move(model: nn.Module, device: torch.device | str, *, parts: bool = True) -> None:
    """Move ``model`` to ``device``, or this rank's part of it where ZeRO-3 sharded it.

    Layers of such a model are gathered on the device that the ranks compute on, wherever their parts rest. What FSDP2
    sharded stays where FSDP2 has it.

    Args:
        model: any model.
        device: where to.
        parts: False leaves the parts of what is sharded alone, and moves what is replicated.
    """
    if not is_sharded(model):
        model.to(device)
        return
    for tensor in (*model.parameters(), *model.buffers()):
        part = getattr(tensor, "ds_tensor", None)
        if hasattr(tensor, "full_tensor") or (part is not None and not parts):
            continue
        held = tensor if part is None else part
        held.data = held.data.to(device)


def most_of_any_rank(counts: Sequence[int], device: torch.device) -> list[int]:
    """Return for each entry its largest value over all ranks; one collective, whatever their number.

    Ranks that hold fewer rows than another make up for the passes that they lack, because a rank that stays away
    from a gathering leaves the others waiting for ever.

    Args:
        counts: the same number of entries on each rank.
        device: where collectives of the default process group run.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not counts:
        return list(counts)
    most = torch.tensor(counts, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return most.tolist()


@contextmanager
def gathered_heads(heads: Sequence[Head]) -> Iterator[list[Head]]:
    """Open some output heads, and yield them with ordinary tensors; a collective call where one is sharded.

    It is made once for a micro-batch, on all ranks, before anything depends on which rows a rank holds, with the heads
    of all models in one order: signals and losses never gather. The price is that the heads of all sharded teachers,
    vocabulary times width each, are in memory together during the loss.

    Args:
        heads: with ``weight`` and ``bias``; several may share a tensor, which is gathered once.

    Yields:
        The heads, in the same order. ZeRO-3 parameters are gathered in place for the duration of the block; of FSDP2's
        DTensors these are the full tensors, whose backward pass scatters the gradient again.
    """
    with gathering([tensor for head in heads for tensor in (head.weight, head.bias)]):
        gathered: dict[int, Any] = {}
        for head in heads:
            for tensor in (head.weight, head.bias):
                if tensor is not None and id(tensor) not in gathered:
                    gathered[id(tensor)] = gathered_tensor(tensor)
        yield [
            replace(head, weight=gathered[id(head.weight)], bias=None if head.bias is None else gathered[id(head.bias)])
            for head in heads
        ]


def close_process_group() -> None:
    """Leave the default process group, if there is one; the last call of a program, on every rank.

    A thread of Gloo drops the tensors of a collective after the collective is over. Where the interpreter ends at that
    moment, the thread cannot take its lock and the process aborts: "terminate called without an active exception"
    (torch 2.13, Python 3.11; seen more often on a busy machine). Leaving the group waits for its threads, unless
    something still refers to it, as DistributedDataParallel does to the end; so this waits until they sleep.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _wait_for_gloo()


def _wait_for_gloo(seconds: float = 5.0) -> None:
    """Wait until Gloo's threads have nothing to do: they sleep at three looks in a row. Linux alone tells."""
    asleep, end = 0, time.monotonic() + seconds
    while asleep < 3 and time.monotonic() < end:
        time.sleep(0.01)  # without the interpreter's lock, which such a thread may be waiting for
        asleep = 0 if any(_is_busy(thread) for thread in Path("/proc/self/task").glob("*/stat")) else asleep + 1


def _is_busy(thread: Path) -> bool:
    try:
        name, _, state = thread.read_text().partition("(")[2].rpartition(")")
    except OSError:  # it has ended
        return False
    return "gloo_runloop" in name and state.split()[0] != "S"


def inference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a student's DeepSpeed configuration into one that shards a frozen model over all ranks.

    Args:
        config: the student's configuration, of any stage, with its batch sizes filled in.

    Returns:
        Stage 3 with the student's precision and parameter offload; without optimizer or its offload.
    """
    frozen = {key: copy.deepcopy(value) for key, value in config.items() if key not in _TRAINING_ONLY}
    zero = frozen.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    zero["stage"] = 3
    return frozen


def shard_for_inference(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """Wrap a frozen ``model`` in a DeepSpeed engine that keeps one part of it on each rank.

    A model that was loaded under ZeRO-3 is sharded already and is taken as it is; any other is sharded now, after
    each rank has held all of it in host memory.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=inference_config(config))
    engine.eval()
    return engine


def through(wrapper: nn.Module, model: nn.Module) -> Callable[..., Any]:
    """Return what runs a method of ``model`` as a forward pass of its wrapper.

    A wrapper gathers what its own ``forward`` needs and lets go of it at the end, so a method that is called beside it
    would find parts. The result goes into ``InProcessTeacher.attach``.

    Args:
        wrapper: a DeepSpeed engine, for example; ``model`` itself where FSDP2 sharded it, or where nothing wraps it.
        model: inside of it.
    """

    def call(method: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        own = model.__dict__.get("forward")

        def redirected(*args: Any, **kwargs: Any) -> Any:
            restore()  # the method may want the real forward
            return method(*args, **kwargs)

        def restore() -> None:
            if own is None:
                model.__dict__.pop("forward", None)
            else:
                model.forward = own

        model.forward = redirected
        try:
            return wrapper(*inputs, **named)
        finally:
            restore()

    return call


def called(method: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Run a method where nothing must be entered for it; what :func:`through` returns for a model without a wrapper."""
    return method(*inputs, **named)


def shard_with_fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    """Shard ``model`` over all ranks with FSDP2, in place: each layer a unit, the rest another.

    Args:
        model: the same on each rank.
        **options: those of ``fully_shard``, such as ``mesh``, ``mp_policy`` and ``reshard_after_forward``, which is
            to be true of a model that has no backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in outermost_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights when all are gathered."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def missing_bytes(model: nn.Module) -> int:
    """Return the bytes that gathering adds to those that this rank holds."""
    held = sum(p.ds_tensor.numel() * p.element_size() for p in model.parameters() if hasattr(p, "ds_tensor"))
    return gathered_bytes(model) - held


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``, or None where its backend does not tell."""
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):
        return None
    free = backend.mem_get_info(device)[0]  # type: ignore[union-attr]
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)  # type: ignore[union-attr]
    return int(free + cached)
