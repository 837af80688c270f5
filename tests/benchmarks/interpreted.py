"""The Triton kernels that Inductor generates for the panel loss, without a GPU: compiled for three cards, and computed.

    python -m tests.benchmarks.interpreted                     # cubins for sm_80, sm_90 and sm_100
    TRITON_INTERPRET=1 python -m tests.benchmarks.interpreted  # computes on the CPU, against float64

Needs ``pip install triton``, which a torch for CPUs does not bring. Functions of libdevice, which Triton's interpreter
does not have, are exchanged for Triton's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.compiled import passes
from tests.benchmarks import generated

ROWS, VOCAB = 3, 2100  # blocks of 512 and a part of one
CARDS = (80, 90, 100)
_OURS = {
    "libdevice.exp": "tl.exp", "libdevice.log1p(": "tl.log(1.0 + ", "tl_math.": "tl.",
    "triton_helpers.max2(": "tl.max(", "triton_helpers.maximum(": "tl.maximum(",
}  # fmt: skip


def cases() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return function, names of the tensors that are given, and settings."""
    both = "student_rv student_lse_r1 teacher_rv"
    one = f"{both} teacher_lse_r1"
    found: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "statistics": (passes.statistics, "logits_rv", {}),
        "forward KL": (passes.kl_statistics, both, {"of_student": False}),
        "reverse KL": (passes.kl_statistics, both, {"of_student": True}),
    }
    for name in ("jsd", "skew_kl"):
        found[name] = (passes.compared, one, {"divergence": Divergence(name)})
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        given = f"{one} factor_r1 weight_r1 out_rv"
        found[f"gradient of {name}"] = (passes.gradient, given, {"divergence": Divergence(name)})
    return found


class Kernel:
    """One kernel of generated code."""

    def __init__(self, name: str, body: str, folder: Path) -> None:
        self.signature = eval(re.search(r"'signature': (\{.*?\})", body).group(1))  # type: ignore[union-attr]
        body = re.sub(r"@triton_heuristics\..*?\n\)\n", "", body, flags=re.S)
        body = body.replace("triton_helpers.set_driver_to_gpu()", "")
        for theirs, ours in _OURS.items() if os.environ.get("TRITON_INTERPRET") else ():
            body = body.replace(theirs, ours)
        path = folder / f"kernel_{len(list(folder.iterdir()))}.py"
        path.write_text(body, encoding="utf-8")  # Triton reads a kernel's source from its file
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        self.function, self.block = getattr(module, name), 8 if "r0_numel" in self.signature else 1024
        self.sizes = {a: 512 if a == "R0_BLOCK" else self.block for a, t in self.signature.items() if t == "constexpr"}

    def run(self, *arguments: Any, stream: Any) -> None:
        """Compute, as generated code calls it."""
        given = dict(zip([a for a, t in self.signature.items() if t != "constexpr"], arguments, strict=True))
        self.function[(-(-given["xnumel"] // self.block),)](*arguments, **self.sizes)

    def cubin(self, card: int) -> int:
        """Compile for a card; the bytes of its code."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constants = {(self.function.arg_names.index(name),): value for name, value in self.sizes.items()}
        source = ASTSource(self.function, dict(self.signature), constexprs=constants)
        return len(triton.compile(source, target=GPUTarget("cuda", card, 32)).asm["cubin"])


def kernels_of(code: str, folder: Path) -> dict[str, Kernel]:
    """Load the kernels of generated code."""
    found = re.findall(r"async_compile\.triton\('(triton_\w+)', '''(.*?)'''", code, re.S)
    return {name: Kernel(name, body, folder) for name, body in found}


def computed(code: str, kernels: dict[str, Kernel], inputs: list[Any]) -> Any:
    """Run generated code over tensors on the CPU."""
    place = SimpleNamespace(_DeviceGuard=lambda index: contextlib.nullcontext(), set_device=lambda index: None)
    names: dict[str, Any] = {
        "torch": SimpleNamespace(float32=torch.float32, cuda=place),
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "reinterpret_tensor": lambda t, size, stride, o=0: t.as_strided(size, stride, t.storage_offset() + o),
        "assert_size_stride": lambda *_: None,
        "copy_if_misaligned": lambda tensor: tensor,
        "get_raw_stream": lambda index: 0,
        **kernels,
    }
    exec(code[code.index("class Runner") : code.index("runner = Runner")], names)
    return names["Runner"](partitions=[]).call(inputs)


def made(name: str) -> Tensor:
    """Draw a tensor for a parameter: logits, normalizers, weights, or memory."""
    return torch.randn(ROWS, VOCAB) * 3 if name.endswith("rv") else torch.rand(ROWS, 1) + 9.0 * ("lse" in name)


def main(only: str = "") -> None:
    """Compile, or compute and compare, each function."""
    for title, (function, names, settings) in cases().items():
        if only not in title:
            continue
        torch.manual_seed(0)
        order = [name.lower() for name in function.__code__.co_varnames[: function.__code__.co_argcount]]
        given = {name: made(name) for name in names.split()}
        with generated.fake_card():
            fakes = [torch.empty(ROWS, *given[n].shape[1:], device="cuda") if n in given else None for n in order]
            code, inputs = generated.code_and_inputs(function, *fakes, **settings)
        with tempfile.TemporaryDirectory() as folder:
            kernels = kernels_of(code, Path(folder))
            if not os.environ.get("TRITON_INTERPRET"):
                sizes = [[kernel.cubin(card) for card in CARDS] for kernel in kernels.values()]
                print(f"{title}: bytes for {CARDS}: {sizes}", flush=True)
                continue
            exact = {name: tensor.double() for name, tensor in given.items()}
            expected = function(*(exact.get(name) for name in order), **settings)
            bound = [ROWS if name.startswith("s") else given[name[2:-1]] for name in inputs]
            found = computed(code, kernels, bound)
        pairs = [(given["out_rv"], exact["out_rv"])] if expected is None else list(zip(found, expected, strict=True))
        apart = max(float((a.reshape(b.shape) - b).abs().max() / b.abs().max()) for a, b in pairs)
        print(f"{title}: {apart:.1e} of the largest value", flush=True)
        assert apart < 1e-5, title


if __name__ == "__main__":
    main(*sys.argv[1:])
