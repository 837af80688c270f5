"""Ways to reach a teacher; each emits a signal, and knows where it comes from."""

from kd_plugin.teachers.base import Teacher
from kd_plugin.teachers.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]
