"""The TRL host: trainers that take the place of TRL's own, and a callback for any transformers trainer.

Everything here that leans on TRL's internals stays small; ``tests/contract`` names the signatures it relies on.
"""

from kd_plugin.lineage.trainer_callback import LicenseLineageCallback
from kd_plugin.trl.config import OfflineKDConfig, TeacherPanelConfig
from kd_plugin.trl.offline_trainer import OfflineKDTrainer
from kd_plugin.trl.panel_trainer import TeacherPanelTrainer

__all__ = [
    "LicenseLineageCallback",
    "OfflineKDConfig",
    "OfflineKDTrainer",
    "TeacherPanelConfig",
    "TeacherPanelTrainer",
]
