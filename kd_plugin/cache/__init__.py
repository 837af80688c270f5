"""The teacher cache: a teacher's outputs, captured once, stored so that every flipped byte shows.

``kd_plugin.capturing`` fills one, ``TeacherCache`` reads it. On the disk: targets.py says what is kept, schema.py is a
row, manifest.py and store.py are the directory, files.py is what makes a crash or a flipped byte show.
For training: mapped_write.py and mapped_read.py are the memory-mapped form, joining.py and joint.py bring targets and
tokens together, alignment.py notices targets that belong to the token beside.
"""

from kd_plugin.cache.manifest import Manifest
from kd_plugin.cache.reader import TeacherCache
from kd_plugin.cache.schema import example_id
from kd_plugin.cache.targets import Generation, Sampled, Targets, TopK, TopP

__all__ = ["Generation", "Manifest", "Sampled", "Targets", "TeacherCache", "TopK", "TopP", "example_id"]
