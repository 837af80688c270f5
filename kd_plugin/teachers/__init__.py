"""Ways to reach a teacher; each emits a signal, and knows where it comes from.

base.py says what a teacher can do · local.py runs in this process · server.py asks a vLLM server, through
client.py (requests,
retries), handshake.py (what it must say of itself) and replies.py (what its answers must hold).
"""

from kd_plugin.teachers.base import Teacher
from kd_plugin.teachers.local import LocalTeacher
from kd_plugin.teachers.server import ServerTeacher

__all__ = ["LocalTeacher", "ServerTeacher", "Teacher"]
