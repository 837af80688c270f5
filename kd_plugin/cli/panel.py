"""``kd-plugin panel``: train a student on-policy with several teachers."""

from __future__ import annotations

from collections.abc import Sequence

from kd_plugin.cli.training import train
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin panel ARGV``; the teachers are the mapping ``teacher_models`` of the configuration."""
    return train("panel", TeacherPanelTrainer, TeacherPanelConfig, argv)
