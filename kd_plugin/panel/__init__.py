"""Several teachers that correct what a student wrote.

``roster`` says who is on the panel and who judges which row, ``weights`` how much each counts, ``estimators`` how a
divergence is estimated and what is defined, ``checks`` what must hold before a run. ``scoring`` asks the teachers,
``combining`` groups their answers, ``loss`` makes one loss of them. ``rollouts`` says who writes what is corrected.
"""

from kd_plugin.divergence.modes import Combine
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.loss import CorrectionLoss, correction_loss
from kd_plugin.panel.roster import Assignment, OwnTerms, TeacherPanel
from kd_plugin.panel.schedule import Schedule
from kd_plugin.panel.scoring import Correction, score_rows

__all__ = [
    "Assignment",
    "Combine",
    "Correction",
    "CorrectionLoss",
    "Estimator",
    "OwnTerms",
    "Schedule",
    "TeacherPanel",
    "correction_loss",
    "score_rows",
]
