"""Several teachers that correct what a student wrote.

``roster`` says who is on the panel and who judges which row, ``scoring`` asks them, ``combining`` turns their
signals into the terms of one loss.
"""

from kd_plugin.panel.combining import panel_groups
from kd_plugin.panel.roster import Combine, TeacherPanel
from kd_plugin.panel.scoring import Correction, score_rows

__all__ = ["Combine", "Correction", "TeacherPanel", "panel_groups", "score_rows"]
