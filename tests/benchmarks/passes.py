"""Count the floating-point operations and bytes of the panel loss on a GPU, ours, TRL's and Liger's, and the time.

    python -m tests.benchmarks.passes [--width 4096] [--vocab 151936] [--teachers 1 3 8] [--gpu h100]
    python -m tests.benchmarks.passes --all     # H = 576, 4096, 8192 by V = 49,152, 128,256, 151,936

No GPU is needed. Our loss runs on torch's meta device, which computes nothing, at the real sizes and by the path of a
GPU. A compiled pass counts with what Inductor generates for it (``generated.py``); any other operation as a kernel that
reads each operand once and writes each result once. TRL's Triton kernels and Liger's loss cannot run there, so what
they read and write is listed here by hand, from ``trl/kernels/chunked_divergence.py`` of TRL 1.16.0, and from
``fused_linear_jsd.py`` of Liger of commit 0eaa2d5, whose loss is the same for every beta.

The time of an operation is the larger of operations over the tensor cores' rate and bytes over the memory's rate
(Williams et al., "Roofline", 2009). Launches cost nothing in it, and no kernel reaches either rate: it ranks, and it
shows what bounds what. Rates are NVIDIA's data sheets': H100 SXM 989 TFLOP/s in dense bfloat16 and 3.35 TB/s, H200
the same and 4.8 TB/s.

Shape suffixes: N positions, V tokens, H hidden width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_plugin.divergence import projection
from kd_plugin.divergence.compiled import tiles as compiled
from kd_plugin.divergence.fused import LossPlan, panel_pass
from kd_plugin.divergence.modes import PanelGroup, TeacherTerm
from kd_plugin.divergence.spec import Divergence
from kd_plugin.signals import HiddenSignal, OutputHead
from tests.benchmarks import generated

GPUS = {"h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12)}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
WIDTHS, VOCABULARIES = (576, 4096, 8192), (49152, 128256, 151936)
_TRL_ROWS = 4096  # TRL's TOKEN_CHUNK_SIZE: how often the head and its gradient are read again
_ALLOCATIONS = ("aten.empty", "aten.new_empty")


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name, floating-point operations of a matrix product, bytes read and written."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: str) -> float:
        """Time that the roofline allows."""
        rate, bandwidth = GPUS[gpu]
        return max(self.flops / rate, self.bytes / bandwidth)


class Counter(TorchDispatchMode):
    """Lists the kernels of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and list it, unless it only looks at memory or reserves it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func)
        if func.is_view or name.startswith(_ALLOCATIONS):
            return out
        read = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
        flops = 0.0
        if "mm" in name:
            left, right = [tensor for tensor in read if tensor.dim() == 2][-2:]
            flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        self.kernels.append(Kernel(name, flops, _size(read) + _size(_tensors(out))))
        return out


def ours(divergence: str, *, teachers: int, positions: int, vocab: int, width: int, fused: bool = True) -> list[Kernel]:
    """List the kernels of one pass of our loss over N positions, bfloat16 weights, gradients of student and head.

    Args:
        divergence: its name.
        teachers: how many.
        positions: N.
        vocab: V.
        width: H.
        fused: by compiled passes; else step by step.
    """

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def widens(narrow: torch.dtype, wide: torch.dtype, device: torch.device) -> bool:
        return narrow == torch.bfloat16 and wide == torch.float32  # as on CUDA

    terms = tuple(
        TeacherTerm(HiddenSignal(tensor(positions, width), OutputHead(tensor(vocab, width)))) for _ in range(teachers)
    )
    head = OutputHead(tensor(vocab, width))
    needs = (True, True, False)
    groups = (PanelGroup(None, terms),)
    plan = LossPlan(
        head, groups, Divergence(divergence), 1.0, needs, torch.float32, None, values=False, compiled=fused
    )  # fmt: skip
    counter = Counter()

    def run(function: Any, *tensors: Tensor | None, **static: Any) -> Any:
        given = [t for t in tensors if t is not None]
        cells = given[0].shape[0] * vocab
        each = generated.bytes_of(function, *tensors, **static)
        counter.kernels.append(Kernel(function.__name__, 0.0, each * cells))
        return _results(function, given[0])

    with (
        mock.patch.object(projection, "can_widen", widens),
        mock.patch.object(compiled, "run", run),
        counter,
    ):
        panel_pass(tensor(positions, width), head.weight, None, head.real_rows(), plan)
    return counter.kernels


def _results(function: Any, tile: Tensor) -> Any:
    """Return what a function of ``passes.py`` returns, without values."""
    column, row = tile.new_empty(tile.shape[0], 1), tile.new_empty(tile.shape[0])
    if function.__name__ == "statistics":
        return column, row, row
    if function.__name__ == "kl_statistics":
        return column, row
    if function.__name__ == "compared":
        return row, row
    return None


def trls(divergence: str, *, positions: int, vocab: int, width: int) -> list[Kernel]:
    """List the kernels of TRL's loss for one teacher of the student's width; it has no other case."""
    tile, product = float(positions * vocab), 2.0 * positions * vocab * width
    chunks = -(-positions // _TRL_ROWS)
    head, hidden = 2.0 * vocab * width * chunks, 2.0 * positions * width
    project = Kernel("project", product, 4 * tile + head + hidden)
    both = [project, project]
    kernels = [*both, Kernel("statistics", 0, 8 * tile)]
    if divergence == "jsd":
        kernels += [*both, Kernel("second pass of the JSD", 0, 8 * tile)]
    kernels += [*both, Kernel("gradient", 0, 12 * tile), Kernel("gradient to bfloat16", 0, 6 * tile)]
    kernels.append(Kernel("gradient of hidden states", product, 2 * tile + head + 8.0 * positions * width))
    kernels.append(Kernel("gradient of the head", product, 2 * tile + hidden + 8.0 * vocab * width * chunks))
    return kernels


def ligers(*, positions: int, vocab: int, width: int) -> list[Kernel]:
    """List the kernels of Liger's fused linear JSD for one teacher; each of its operations is a kernel."""
    tile, product = float(positions * vocab), 2.0 * positions * vocab * width
    rows = 1 << (-(-positions // -(-vocab // width)) - 1).bit_length()
    chunks = -(-positions // rows)
    head, hidden = 2.0 * vocab * width * chunks, 2.0 * positions * width
    project = Kernel("project", product, 2 * tile + head + hidden)
    # In bytes of an element, both models': to float32, by the temperature, log-softmax; then the JSD's kernel, the copy
    # of its losses, their zeros and their sum; softmax, sum, product, difference, by the temperature, to bfloat16
    passes = (12, 16, 16, 16, 8, 4, 4, 8, 4, 8, 12, 8, 6)
    return [
        project,
        project,
        *(Kernel("pass", 0, each * tile) for each in passes),
        Kernel("gradient of hidden states", product, 2 * tile + head + hidden),
        Kernel("gradient of the head", product, 2 * tile + hidden + head),
        Kernel("gradient of the head, added", 0, 3 * head),
    ]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: list[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


@dataclass(frozen=True)
class Cost:
    """What a loss costs a position: products in units of 2·H·V, bytes a token of the vocabulary, and time."""

    products: float
    product_bytes: float
    pass_bytes: float
    microseconds: float


def cost(kernels: list[Kernel], gpu: str, *, positions: int, vocab: int, width: int) -> Cost:
    """Sum up kernels, a position."""
    cells = positions * vocab
    return Cost(
        sum(kernel.flops for kernel in kernels) / (2.0 * cells * width),
        sum(kernel.bytes for kernel in kernels if kernel.flops) / cells,
        sum(kernel.bytes for kernel in kernels if not kernel.flops) / cells,
        1e6 * sum(kernel.seconds(gpu) for kernel in kernels) / positions,
    )


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    sizes = {"positions": arguments.positions, "vocab": arguments.vocab, "width": arguments.width}
    liger = cost(ligers(**sizes), arguments.gpu, **sizes)
    for divergence in DIVERGENCES:
        theirs = None
        if divergence != "skew_kl":
            theirs = cost(trls(divergence, **sizes), arguments.gpu, **sizes)
            yield _line(divergence, "TRL, 1", theirs, theirs)
            yield _line(divergence, "Liger, 1", liger, theirs)
        for teachers in arguments.teachers:
            mine = cost(ours(divergence, teachers=teachers, **sizes), arguments.gpu, **sizes)
            yield _line(divergence, f"ours, {teachers}", mine, theirs)


def _line(divergence: str, who: str, found: Cost, theirs: Cost | None) -> tuple[str, ...]:
    teachers = int(who.split()[-1])
    ratio = "" if theirs is None else f"{found.microseconds / (theirs.microseconds * teachers):.2f}"
    numbers = (f"{found.products:.0f}", f"{found.product_bytes:.0f}", f"{found.pass_bytes:.0f}")
    return (divergence, who, *numbers, f"{found.microseconds:.2f}", ratio)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="H of student and teachers")
    parser.add_argument("--vocab", type=int, default=151936, help="V")
    parser.add_argument("--positions", type=int, default=8192, help="N, scored positions of a micro-batch")
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--all", action="store_true", help="all sizes of the page, one table each")
    arguments = parser.parse_args()
    sizes = [(width, vocab) for width in WIDTHS for vocab in VOCABULARIES] if arguments.all else []
    for width, vocab in sizes or [(arguments.width, arguments.vocab)]:
        table(argparse.Namespace(**{**vars(arguments), "width": width, "vocab": vocab}))


def table(arguments: argparse.Namespace) -> None:
    """Print the table of one size."""
    print(f"\nH = {arguments.width}, V = {arguments.vocab}, N = {arguments.positions}, {arguments.gpu}\n")
    print("| divergence | loss, teachers | products | bytes of products | bytes of passes | µs | of TRL's, a teacher |")
    print("|---|---|---|---|---|---|---|")
    for row in rows(arguments):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
