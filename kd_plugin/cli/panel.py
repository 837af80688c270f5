"""``kd-plugin panel``: train a student on-policy with several teachers."""

from __future__ import annotations

from collections.abc import Sequence

from trl import get_peft_config

from kd_plugin.cli.training import finish, load_rows, parse
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin panel ARGV``; the teachers are the mapping ``teacher_models`` of the configuration."""
    script, training, model = parse("panel", TeacherPanelConfig, argv)
    trainer = TeacherPanelTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load_rows(script, script.dataset_train_split),
        eval_dataset=load_rows(script, script.dataset_test_split) if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    return finish(trainer, training)
