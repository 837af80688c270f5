"""Ways to reach a teacher; each emits a signal, and knows where it comes from.

base.py says what a teacher can do · local.py runs in this process · adapter.py shares one base among many · cached.py
looks its judgement up · server.py asks a vLLM server, through client.py (requests, retries), handshake.py (what it
must say of itself) and replies.py (what its answers must hold).
"""

from kd_plugin.teachers.adapter import AdapterTeacher
from kd_plugin.teachers.base import Teacher
from kd_plugin.teachers.cached import CachedTeacher
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.teachers.server import ServerTeacher

__all__ = ["AdapterTeacher", "CachedTeacher", "LocalTeacher", "ServerTeacher", "Teacher"]
