"""Ways to reach a teacher; each emits a signal, and knows where it comes from.

base.py says what a teacher can do and what it declares. In this process: in_process.py is what all have in common,
local.py one model, adapter.py many over one base, which adapter_check.py compares with them, itself.py the student as
its own teacher. cached.py looks its scores up. server.py asks a vLLM server for token scores, and hidden/ one for
hidden states: served.py holds where it is and what it must say of itself, client.py sends requests and repeats
them, replies.py holds what its answers must hold, and agreement.py that what is asked twice is answered alike.
"""

from collections.abc import Callable, Mapping
from typing import Any

from kd_plugin.teachers.adapter import AdapterTeacher
from kd_plugin.teachers.base import Capabilities, Teacher
from kd_plugin.teachers.cached import CachedTeacher
from kd_plugin.teachers.itself import SelfTeacher
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.teachers.server import ServerTeacher

# What `kind:` may be in a panel's block; its other keys are the arguments of the class
KINDS: Mapping[str, Callable[..., Any]] = {
    "local": LocalTeacher,
    "adapter": AdapterTeacher,
    "server": ServerTeacher,
    "cached": CachedTeacher,
    "self": SelfTeacher,
}

__all__ = [
    "KINDS",
    "AdapterTeacher",
    "CachedTeacher",
    "Capabilities",
    "LocalTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "Teacher",
]
