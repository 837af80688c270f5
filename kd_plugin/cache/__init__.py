"""The teacher cache: a teacher's outputs, captured once, stored so that every flipped byte shows.

``kd_plugin.capturing`` fills one, ``TeacherCache`` reads it. examples.py tokenizes rows as TRL does · targets.py says
what is kept · schema.py, manifest.py and store.py are the directory · mapping.py and mapped.py its memory-mapped form.
"""

from kd_plugin.cache.examples import example_id
from kd_plugin.cache.generation import Generation
from kd_plugin.cache.manifest import Manifest
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.targets import Sampled, Targets, TopK, TopP

__all__ = ["Generation", "Manifest", "Sampled", "Targets", "TeacherCache", "TopK", "TopP", "example_id"]
