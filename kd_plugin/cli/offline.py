"""``kd-plugin offline``: train a student on a teacher cache."""

from __future__ import annotations

from collections.abc import Sequence

from kd_plugin.cli.training import train
from kd_plugin.cli.training_help import Introduction
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer

_INTRODUCTION = Introduction(
    description="""\
Train a student on a teacher cache, which `kd-plugin capture` made: no teacher is in memory. Licenses are checked before
any weights are loaded; the student and its lineage end up in output_dir.""",
    example="""\
example, offline.yaml:
    model_name_or_path: STUDENT
    teacher_cache: CACHE            # or several with weights: {CACHE: 0.7, OTHER: 0.3}
    output_dir: out
    ce_weight: 0.1

  kd-plugin offline --config offline.yaml
  kd-plugin offline --config offline.yaml --learning_rate 2e-5 --packing true
  kd-plugin offline --config offline.yaml --resume_from_checkpoint true
  accelerate launch --config_file zero3.yaml -m kd_plugin offline --config offline.yaml

Without dataset_name it trains on the rows of the cache. Exit codes: 0 trained, 1 refused or failed, 2 wrong usage.""",
    own="offline KD",
)


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin offline ARGV``; without ``dataset_name`` it trains on the rows of the cache."""
    return train("offline", OfflineKDTrainer, OfflineKDConfig, argv, _INTRODUCTION)
