"""The long run: every target in turn, until the time is over. `python -m tests.lineage_fuzz SECONDS`."""

import faulthandler
import inspect
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

os.environ["KD_FUZZ"] = "1"  # read when the targets are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HUNG = 900  # seconds of one target's round, its shrinking included, before C code that no signal interrupts is ended


def targets():
    """Return the fuzzed tests of this folder by name."""
    modules = [
        import_module(f"tests.lineage_fuzz.{path.stem}") for path in sorted(Path(__file__).parent.glob("test_*.py"))
    ]
    found = [pair for module in modules for pair in inspect.getmembers(module, inspect.isfunction)]
    return {f"{f.__module__.rsplit('.', 1)[-1]}::{name}": f for name, f in found if hasattr(f, "hypothesis")}


def main(seconds: float) -> int:
    """Run, print what each target saw, and return 1 where one of them found a fault."""
    from tests.lineage_fuzz.limits import COUNTS, FOLDER

    faulthandler.enable()
    running, faults = targets(), []
    begun, cpu = time.monotonic(), time.process_time()
    while running and time.monotonic() - begun < seconds:
        for name, target in list(running.items()):
            if time.monotonic() - begun >= seconds:
                break
            faulthandler.dump_traceback_later(HUNG, exit=True)
            try:
                target()
            except Exception:
                traceback.print_exc()
                faults.append(name)
                del running[name]  # it would find the same again
            finally:
                faulthandler.cancel_dump_traceback_later()
    print(f"\n{'target':24}{'examples':>10}")
    for name, count in sorted(COUNTS.items()):
        print(f"{name:24}{count:>10}")
    print(f"{'all':24}{COUNTS.total():>10}")
    took, own = time.monotonic() - begun, time.process_time() - cpu
    print(f"{took:.0f} s, of which {own:.0f} s of this process; found examples: {FOLDER}")
    print(f"faults: {', '.join(faults) or 'none'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
