"""Teacher outputs that another tool stored, read into a teacher cache.

A reader of a format (distillkit.py, axolotl.py) gives rows of token ids and the listed tokens at their positions. To
a capture they are a teacher (teacher.py) that was asked before: the license gate, the lineage, the check of the
alignment, and what makes a crash show are those of any capture.
"""

from kd_plugin.importing.run import FORMATS, ImportSettings, import_outputs
from kd_plugin.importing.teacher import StoredOutputs, StoredTeacher

__all__ = ["FORMATS", "ImportSettings", "StoredOutputs", "StoredTeacher", "import_outputs"]
