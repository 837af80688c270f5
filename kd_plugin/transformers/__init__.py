"""Any subclass of ``transformers.Trainer`` as a host: mixins to be put before the trainer that you have.

What they share with TRL's trainers, which are transformers trainers too, is in :mod:`kd_plugin.trainers`.
"""

from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.lineage.trainer_callback import LicenseLineageCallback
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.trainers.evaluation import TaskEvaluationMixin
from kd_plugin.trainers.offline import OfflineKDMixin
from kd_plugin.transformers.panel import TeacherPanelMixin

__all__ = [
    "EvaluationSettings",
    "LicenseLineageCallback",
    "OfflineKDMixin",
    "OfflineSettings",
    "PanelSettings",
    "TaskEvaluationMixin",
    "TeacherPanelMixin",
]
