"""Producing a teacher cache: a dataset's rows go in, a teacher's targets for each token come out.

The room is not called ``capture``, because ``kd_plugin.capture`` is the function: a package of that name would take
its place as soon as anything imports it. rows.py reads datasets · engines.py asks the teacher, writing.py lets it
generate, filters.py decides which completions are kept · extract.py is the hot loop · work.py does the units.
"""

from kd_plugin.capturing.capture import capture

__all__ = ["capture"]
