"""``kd-plugin offline``: train a student on a teacher cache."""

from __future__ import annotations

from collections.abc import Sequence

from trl import get_peft_config

from kd_plugin.cli.training import finish, load_rows, parse
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer


def main(argv: Sequence[str]) -> int:
    """Run ``kd-plugin offline ARGV``; without ``dataset_name`` it trains on the rows of the cache."""
    script, training, model = parse("offline", OfflineKDConfig, argv)
    trainer = OfflineKDTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load_rows(script, script.dataset_train_split),
        eval_dataset=load_rows(script, script.dataset_test_split) if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    return finish(trainer, training)
