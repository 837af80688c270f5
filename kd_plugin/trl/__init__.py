"""The TRL host: trainers that take the place of TRL's own, and a callback for any transformers trainer.

Everything here that leans on TRL's internals stays small; ``tests/contract`` names the signatures it relies on.
"""

from typing import TYPE_CHECKING, Any

from kd_plugin.lineage.trainer_callback import LicenseLineageCallback
from kd_plugin.trl.config import OfflineKDConfig
from kd_plugin.trl.offline_trainer import OfflineKDTrainer
from kd_plugin.trl.upstream import HAS_PANEL, refuse_panel

if TYPE_CHECKING or HAS_PANEL:
    from kd_plugin.trl.panel_trainer import TeacherPanelConfig, TeacherPanelTrainer

__all__ = [
    "LicenseLineageCallback",
    "OfflineKDConfig",
    "OfflineKDTrainer",
    "TeacherPanelConfig",
    "TeacherPanelTrainer",
]


def __getattr__(name: str) -> Any:
    """Say what the panel needs where TRL is too old for it; called for names that are not there."""
    if name in __all__:
        refuse_panel(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
