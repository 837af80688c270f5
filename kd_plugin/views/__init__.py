"""Views: how a teacher reads what the student generated; which prompt, which chat template, which tokens.

view.py has the settings of a view and the template of its context, render.py turns the rows of a generation batch into
what one teacher reads.
"""

from kd_plugin.views.render import Reader, Reading
from kd_plugin.views.view import View

__all__ = ["Reader", "Reading", "View"]
