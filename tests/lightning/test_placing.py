"""Placements that a strategy cannot give are refused."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from kd_plugin.errors import ConfigError
from kd_plugin.lightning.placing import place_teachers
from kd_plugin.panel import TeacherPanel


def test_a_routed_panel_of_sharded_teachers_is_refused(teacher_dir, other_teacher_dir):
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its constructor wants GPUs
    strategy.config = {"zero_optimization": {"stage": 3}}
    trainer = SimpleNamespace(strategy=strategy, world_size=2)
    panel = TeacherPanel({"a": teacher_dir, "b": other_teacher_dir}, combine="route")
    with pytest.raises(ConfigError, match="weighted_kl"):
        place_teachers(panel, trainer, SimpleNamespace(), None, None)
