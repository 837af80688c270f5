"""Bytes that the compiled passes of the panel loss read and write, from the Triton code that Inductor generates.

No GPU is needed: tensors are fake ones on "cuda", the card's properties are told (an H100's), and code is generated
but not compiled. Each load and store in a kernel counts once for every element of the kernel's loop, so a row that a
kernel reads in two loops counts twice. A block of tokens that is read again at once counts once: it is a few kilobytes,
and in the core's cache. What is not a tile (statistics of rows, partial ones of blocks) counts by its size too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import mark_dynamic
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

ROWS = 440  # of the fake tiles; bytes are given by element, so that any number would do
_CACHED = 1024  # elements of a row that a program keeps between two loops over them
_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8, "i64": 8, "i32": 4, "i1": 1}
_H100 = SimpleNamespace(
    name="NVIDIA H100", type="cuda", index=0, cc=90, major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=80 << 30, gcnArchName=None, L2_cache_size=50 << 20, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, uuid="0",
)  # fmt: skip


class _Generated(Exception):
    """Carries the code out of Inductor before it is compiled."""


@contextmanager
def _card() -> Iterator[None]:
    """Have torch take the machine for one with an H100."""
    told: dict[tuple[Any, str], Any] = {
        (torch.cuda, "get_device_properties"): lambda *a, **k: _H100,
        (torch.cuda, "get_device_capability"): lambda *a, **k: (9, 0),
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "device_count"): lambda: 1,
        (CudaInterface, "get_device_properties"): staticmethod(lambda *a, **k: _H100),
        (CudaInterface, "get_compute_capability"): staticmethod(lambda *a, **k: 90),
        (CudaInterface, "current_device"): staticmethod(lambda: 0),
        (CudaInterface, "device_count"): staticmethod(lambda: 1),
        (CudaInterface, "is_available"): staticmethod(lambda: True),
        (CudaInterface, "is_bf16_supported"): staticmethod(lambda *a, **k: True),
        (CudaInterface, "is_triton_capable"): staticmethod(lambda *a, **k: True),
        (CudaInterface, "raise_if_triton_unavailable"): staticmethod(lambda *a, **k: None),
        (torch.utils._triton, "triton_hash_with_backend"): lambda: "none",
        (torch.Tensor, "copy_"): lambda self, other: torch.ops.aten.copy_.default(self, other),  # asks for no driver
        (scheduler, "has_triton"): lambda *a, **k: True,  # nothing of it is needed to write the code
        (joint_graph, "lazy_init"): lambda *a, **k: None,  # patterns that would run on a card
        (CudaInterface.Worker, "get_device_properties"): staticmethod(lambda *a, **k: _H100),
    }
    with ExitStack() as stack:
        for (owner, name), value in told.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def code_of(function: Callable[..., Any], *tensors: Tensor | None, **static: Any) -> str:
    """Return what Inductor generates for an H100 from ``function`` over fake tensors on "cuda"."""
    return code_and_inputs(function, *tensors, **static)[0]


def code_and_inputs(function: Callable[..., Any], *tensors: Tensor | None, **static: Any) -> tuple[str, list[str]]:
    """Return the same, and the names of the inputs of the code in their order, as Dynamo spells them."""
    found: list[str] = []
    names: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        names.extend(node.name for node in graph.graph.nodes if node.op == "placeholder")
        return compile_fx(graph, inputs)

    def stop(self: GraphLowering, *args: Any, **kwargs: Any) -> Any:
        wrapper, _ = self.codegen()
        found.append(wrapper.value)
        raise _Generated

    code = function.__code__.replace(co_name=f"{function.__name__}_counted")
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    for tensor in tensors:
        if tensor is not None:
            mark_dynamic(tensor, 0)
    # With several threads code that is written is also compiled, as soon as other processes wait for it
    no_threads = {"compile_threads": 1, "force_disable_caches": True}
    settings = inductor.patch(pattern_matcher=False, joint_graph_constant_folding=False, **no_threads)
    with _card(), mock.patch.object(GraphLowering, "compile_to_module", stop), torch.no_grad(), settings:
        torch._dynamo.reset()
        try:
            torch.compile(own, fullgraph=True, backend=backend)(*tensors, **static)
        except Exception:
            if not found:
                raise
    return found[0], names


@contextmanager
def fake_card() -> Iterator[None]:
    """Let tensors be made on "cuda" that hold nothing."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        yield


def bytes_of(function: Callable[..., Any], *tensors: Tensor | None, **static: Any) -> float:
    """Return the bytes that a function of ``passes.py`` reads and writes on a GPU, of one element of a tile.

    Args:
        function: the function.
        tensors: what it is called with, on any device; the first is a tile.
        static: its settings.
    """
    layout = tuple(None if t is None else (tuple(t.shape[1:]), t.dtype) for t in tensors)
    same = tuple(next(j for j, other in enumerate(tensors) if other is tensor) for tensor in tensors)
    return _bytes_of(function, layout, same, tuple(static.items()))


@cache
def _bytes_of(function: Any, layout: tuple[Any, ...], same: tuple[int, ...], static: tuple[Any, ...]) -> float:
    with _disable_current_modes(), fake_card():  # a mode that counts operations is none of the compiler's
        made = [None if one is None else torch.empty(ROWS, *one[0], dtype=one[1], device="cuda") for one in layout]
        given = [made[i] if tensor is not None else None for i, tensor in zip(same, made, strict=True)]
        code = code_of(function, *given, **dict(static))
    return traffic(code, ROWS * layout[0][0][0])[0]


def traffic(code: str, tile: int) -> tuple[float, int]:
    """Return the bytes that generated code reads and writes, of one element of a tile, and the number of its kernels.

    Args:
        code: what Inductor generated.
        tile: elements of a tile.
    """
    total, calls = 0.0, 0
    kernels = dict(_kernels(code))
    for name, given in re.findall(r"(triton_\w+)\.run\((.*), stream=", code):
        calls += 1
        total += _bytes(kernels[name], _counts(code, kernels[name], given))
    assert calls, "no kernel was generated"
    return total / tile, calls


def _kernels(code: str) -> Iterator[tuple[str, str]]:
    yield from re.findall(r"async_compile\.triton\('(triton_\w+)', '''(.*?)'''", code, re.S)


def _counts(code: str, body: str, given: str) -> dict[str, int]:
    """Return xnumel and r0_numel of a call."""
    names = re.findall(r"(\w+)", re.search(r"def triton_\w+\((.*?)\)", body).group(1).replace(" : tl.constexpr", ""))  # type: ignore[union-attr]
    values = [value.strip() for value in given.split(",")]
    found = {}
    for name, value in zip(names, values, strict=False):
        if name.endswith("numel"):
            found[name] = _number(code, value)
    return {"r0_numel": 1, **found}


def _number(code: str, text: str) -> int:
    """Evaluate a size such as ``148*s0``, or a name that one was given."""
    assigned = re.search(rf"^\s*{re.escape(text)} = (.+)$", code, re.M) if text.isidentifier() else None
    if assigned is not None:
        text = assigned.group(1)
    text = re.sub(r"\b(s\d+|arg\d+_1|arg\d+_1_size\[0\])(?!\w)", str(ROWS), text)
    assert re.fullmatch(r"[\d\s*+()/-]+", text), f"a size that is not understood: {text}"
    return int(eval(text))  # digits and operators alone


def _bytes(body: str, counts: dict[str, int]) -> float:
    """Sum the loads and stores of one kernel."""
    types = dict(re.findall(r"'(\w+)': '\*(\w+)'", body))
    inner = set(re.findall(r"^\s*(\w+) = xindex$", body, re.M)) | set(
        re.findall(r"^\s*(\w+) = \(?xindex ?%", body, re.M)
    )
    reduces = counts["r0_numel"] > 1
    found = re.findall(r"tl\.(load|store)\((\w+) \+ \((.*?)\),", body)
    if counts["r0_numel"] <= _CACHED:
        found = list(dict.fromkeys(found))
    total = 0.0
    for _, pointer, index in found:
        used = set(re.findall(r"\w+", index))
        each = any(name.startswith("r0_") for name in used) if reduces else bool(used & inner)
        count = counts["xnumel"] * counts["r0_numel"] if each else counts["xnumel"] if reduces else ROWS
        total += count * _SIZES[types[pointer]]
    return total
