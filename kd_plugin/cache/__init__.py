"""The teacher cache: a teacher's outputs, captured once, stored so that every flipped byte shows.

``capture`` fills one, ``TeacherCache`` reads it. targets.py says what is kept · examples.py tokenizes as TRL
does · extract.py is the hot loop · schema.py, manifest.py and store.py are the directory · mapping.py and
mapped.py its memory-mapped form.
"""

from kd_plugin.cache.capture import capture
from kd_plugin.cache.examples import example_id
from kd_plugin.cache.manifest import Manifest
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.targets import Sampled, Targets, TopK, TopP

__all__ = ["Manifest", "Sampled", "Targets", "TeacherCache", "TopK", "TopP", "capture", "example_id"]
