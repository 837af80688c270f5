"""The Lightning host: callbacks for a module that is there already, and ready modules for configuration files.

student.py finds the student and says what must hold · step.py adds the loss to what a training step returns ·
offline.py and panel.py are the callbacks that distil, panel_host.py the trainer as the on-policy step sees it ·
callbacks.py follows every save, and asks the user's own questions · module.py and data.py, with the command of
__main__.py, are for those who write YAML and no Python.
"""

from kd_plugin.launch.checkpoints import to_huggingface
from kd_plugin.lightning.callbacks import LicenseLineage, NoRows, TaskEvaluation
from kd_plugin.lightning.data import KDDataModule
from kd_plugin.lightning.module import OfflineKDModule, TeacherPanelModule
from kd_plugin.lightning.offline import OfflineKD
from kd_plugin.lightning.panel import TeacherPanelCorrection

__all__ = [
    "KDDataModule",
    "LicenseLineage",
    "NoRows",
    "OfflineKD",
    "OfflineKDModule",
    "TaskEvaluation",
    "TeacherPanelCorrection",
    "TeacherPanelModule",
    "to_huggingface",
]
