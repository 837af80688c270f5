"""Producing a teacher cache: a dataset's rows go in, a teacher's targets for each token come out.

The room is not called ``capture``, because ``kd_plugin.capture`` is the function: a package of that name would take
its place as soon as anything imports it. capture.py has that function and its settings; rows.py reads datasets and
tokenization.py tokenizes them as TRL does; engines.py asks the teacher, generating.py lets it generate, and
``kd_plugin.verifying`` decides which completions are kept; extract.py is the hot loop; work.py does the units. plan.py
and fidelity.py measure beforehand.
"""

from kd_plugin.capturing.capture import capture

__all__ = ["capture"]
