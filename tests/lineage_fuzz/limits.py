"""How long the targets run, and what every example is held to: the project's own errors alone, and no hang."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from kd_plugin.errors import KDError

SECONDS = 2.0  # of this process's own time, that one file may take; other work on the machine does not count
LONG = "KD_FUZZ" in os.environ  # set by `make fuzz`
FOLDER = Path(".hypothesis/lineage_fuzz")
COUNTS: Counter[str] = Counter()  # examples that each target saw

# Explaining a failure traces every line, which would count as the file's own time
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": _PHASES}
PROFILE = (
    settings(max_examples=200, database=DirectoryBasedExampleDatabase(FOLDER), print_blob=True, **_COMMON)
    if LONG
    else settings(max_examples=30, derandomize=True, database=None, **_COMMON)
)


class TooSlow(AssertionError):
    """A file took longer than :data:`SECONDS`."""


def held(target: str, see: Callable[[], Any], given: bytes = b"") -> Any:
    """Do one example, and return what came of it, be it one of the project's errors; anything else is a fault.

    Args:
        target: under which the example counts.
        see: does it.
        given: the file; a long run keeps it, so that it is not lost with a process that dies.
    """
    COUNTS[target] += 1
    if LONG:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"last-{target.replace(' ', '-')}").write_bytes(given)
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return see()
    except KDError as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def is_allowed(seen: Any) -> bool:
    """Whether a verdict lets a run go on without a condition; one of the project's errors does not."""
    return not isinstance(seen, KDError) and seen.decision in ("allow", "allow_with_duties", "overridden")


def _stop(*_: Any) -> None:
    raise TooSlow(f"more than {SECONDS} s")
