"""Distillation for the trainers you already use.

Importing this package imports nothing heavy: names are resolved on first use, and no trainer (trl, lightning,
deepspeed) is ever imported from here. Trainers live in ``kd_plugin.trl``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "AdapterTeacher": "kd_plugin.teachers",
    "CachedTeacher": "kd_plugin.teachers",
    "Divergence": "kd_plugin.divergence",
    "LocalTeacher": "kd_plugin.teachers",
    "SelfTeacher": "kd_plugin.teachers",
    "ServerTeacher": "kd_plugin.teachers",
    "TeacherCache": "kd_plugin.cache",
    "TeacherPanel": "kd_plugin.panel",
    "capture": "kd_plugin.capturing",
}

if TYPE_CHECKING:
    from kd_plugin.cache import TeacherCache
    from kd_plugin.capturing import capture
    from kd_plugin.divergence import Divergence
    from kd_plugin.panel import TeacherPanel
    from kd_plugin.teachers import AdapterTeacher, CachedTeacher, LocalTeacher, SelfTeacher, ServerTeacher

__all__ = [
    "AdapterTeacher",
    "CachedTeacher",
    "Divergence",
    "LocalTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "TeacherCache",
    "TeacherPanel",
    "__version__",
    "capture",
]


def __getattr__(name: str) -> Any:
    """Resolve a public name on first use (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kd_plugin' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
