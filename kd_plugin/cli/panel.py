"""``kd-plugin panel``: train a student on-policy with several teachers."""

from __future__ import annotations

from collections.abc import Sequence

from kd_plugin.cli.training import train
from kd_plugin.cli.training_help import Introduction
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer

_INTRODUCTION = Introduction(
    description="""\
Train a student on-policy: it writes, and the teachers of a panel correct every token of what it wrote. Licenses are
checked before any weights are loaded; the student and its lineage end up in output_dir.""",
    example="""\
example, panel.yaml:
    model_name_or_path: STUDENT
    dataset_name: prompts.jsonl       # rows with prompt, and teacher_id or domain
    output_dir: out
    panel:
      divergence: reverse_kl
      routes: {algebra: math, poetry: general}
      teachers:
        math: {model: TEACHER}
        general: {kind: server, url: "http://localhost:8000", repo: OTHER, estimator: topk_tail}

  kd-plugin panel --config panel.yaml
  kd-plugin panel --config panel.yaml --learning_rate 2e-6 --save_rollouts 4
  kd-plugin panel --config panel.yaml --resume_from_checkpoint true
  accelerate launch --config_file zero3.yaml -m kd_plugin panel --config panel.yaml

Watch it with `kd-plugin trace out -o trace.html`. Exit codes: 0 trained, 1 refused or failed, 2 wrong usage.""",
    own="the panel under DeepSpeed",
)


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin panel ARGV``; teachers are the mapping ``teacher_models`` of the configuration, or ``panel``."""
    return train("panel", TeacherPanelTrainer, TeacherPanelConfig, argv, _INTRODUCTION)
