"""Several teachers that score what a student generated: their specification, the on-policy step, and its loss.

``roster`` says who is on the panel and who scores which row, ``weights`` how much each counts, ``estimators`` how a
divergence is estimated and what is defined, ``checks`` what must hold before a run. ``step`` is the on-policy step over
a ``Host``, which ``batches`` declares beside what passes through: ``responding`` has the student respond, alone or with
the panel, ``scoring`` asks the teachers, ``loss`` makes one loss of what they said. ``warmup`` fits caches first,
``anchor`` holds the student near its start, ``text`` is what teachers that write and verifiers give. ``identity`` says
whether a resumed run is under the same panel.
"""

from kd_plugin.divergence.modes import Combine
from kd_plugin.panel.estimators import Estimator
from kd_plugin.panel.loss import MicroBatchLoss, panel_loss
from kd_plugin.panel.roster import Assignment, OwnTerms, TeacherPanel
from kd_plugin.panel.scoring import RowScores, score_rows
from kd_plugin.panel.weights import Schedule

__all__ = [
    "Assignment",
    "Combine",
    "Estimator",
    "MicroBatchLoss",
    "OwnTerms",
    "RowScores",
    "Schedule",
    "TeacherPanel",
    "panel_loss",
    "score_rows",
]
