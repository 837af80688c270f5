"""``kd-plugin offline``: train a student on a teacher cache."""

from __future__ import annotations

from collections.abc import Sequence

from kd_plugin.cli.training import train
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin offline ARGV``; without ``dataset_name`` it trains on the rows of the cache."""
    return train("offline", OfflineKDTrainer, OfflineKDConfig, argv)
