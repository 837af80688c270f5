"""Run the GPU pack and write one file of results.

    make gpu                                          # on a card: all parts, under eight minutes
    python -m tests.gpu --only kernels                # one part
    python -m tests.gpu --device cpu --output FILE    # tiny sizes: shows that it runs, and nothing else

Needs torch, transformers and trl alone; Liger is compared where it is installed. Every part runs, whatever another one
did. The exit code is 1 where a limit was missed or a part failed. Without a GPU it says so, and the code is 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.gpu import correctness, kernels, running, steps
from tests.gpu.report import Place, Table

PARTS: dict[str, Callable[[Place], Table]] = {
    "compiling": running.compiling,
    "correctness": correctness.run,
    "kernels": kernels.run,
    "steps": steps.run,
    "synchronisation": running.synchronisation,
    "offloading": running.offloading,
    "memory": running.planned_memory,
    "run": running.planned_step,
}
BUDGET = 460.0  # seconds after which no further part begins


def described(place: Place) -> str:
    """Name card and versions."""
    card = torch.cuda.get_device_name(0) if place.is_gpu else "no GPU: tiny sizes, no measurement"
    names = ("torch", "triton", "transformers", "trl", "liger-kernel")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    cuda = f", CUDA {torch.version.cuda}" if place.is_gpu else ""
    return f"# GPU pack\n\n{card}{cuda}; {', '.join(versions)}.\n"


def main() -> int:
    """Run the parts; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results.md"))
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch can use here, so the GPU pack is skipped.")
        return 0
    place, begun, failed = Place(arguments.device), time.perf_counter(), False
    arguments.output.write_text(described(place), encoding="utf-8")
    for name in arguments.only:
        started = time.perf_counter()
        if started - begun > BUDGET:
            text, failed = f"## {name}\n\n- FAILED: left out, {BUDGET:.0f} seconds had passed.\n", True
        else:
            try:
                table = PARTS[name](place)
                table.notes.append(f"Took {time.perf_counter() - started:.0f} s.")
                text, failed = table.markdown(), failed or bool(table.failed)
            except Exception:  # the other parts are still worth their time
                text, failed = f"## {name}\n\n- FAILED:\n\n```\n{traceback.format_exc()}```\n", True
        print(text, flush=True)
        with arguments.output.open("a", encoding="utf-8") as file:  # what is measured is kept, whatever comes next
            file.write("\n" + text)
    print(f"{time.perf_counter() - begun:.0f} s in all; results are in {arguments.output}.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
