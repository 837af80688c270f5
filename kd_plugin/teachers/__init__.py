"""Ways to reach a teacher; each emits a signal, and knows where it comes from.

base.py says what a teacher can do and what it declares · local.py runs in this process · adapter.py shares one base
among many · cached.py looks its scores up · server.py asks a vLLM server, through client.py (requests, retries),
handshake.py (what it must say of itself) and replies.py (what its answers must hold) · placing.py puts those of this
process where the host has room · identity.py tells weights apart for a run that is resumed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from kd_plugin.teachers.adapter import AdapterTeacher
from kd_plugin.teachers.base import Capabilities, Teacher
from kd_plugin.teachers.cached import CachedTeacher
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.teachers.server import ServerTeacher

# What `kind:` may be in a panel's block; its other keys are the arguments of the class
KINDS: Mapping[str, Callable[..., Any]] = {
    "local": LocalTeacher,
    "adapter": AdapterTeacher,
    "server": ServerTeacher,
    "cached": CachedTeacher,
}

__all__ = ["KINDS", "AdapterTeacher", "CachedTeacher", "Capabilities", "LocalTeacher", "ServerTeacher", "Teacher"]
