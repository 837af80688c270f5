"""A clean start, lineage in every checkpoint, and resumed runs that stay one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from kd_plugin.launch.checkpoints import resume_shards
from kd_plugin.lineage.record import RECORD
from kd_plugin.lineage.start import refuse_another_run
from kd_plugin.lineage.trainer_callback import lineage_callback
from kd_plugin.transformers.start import resumed_checkpoint


class LineageSavingMixin(Trainer):
    """What this package's trainers add to a trainer's life."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        callback = lineage_callback(self.callback_handler.callbacks)
        if callback is not None:
            callback.attach(self)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the parent does.

        Raises:
            ConfigError: ``output_dir`` holds another run's checkpoints, and this call does not resume; or it resumes
                ZeRO shards that another number of ranks wrote.
        """
        callback = lineage_callback(self.callback_handler.callbacks)
        checkpoint = resumed_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint and self.is_deepspeed_enabled:
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            resume_shards(checkpoint, self.args.world_size, settings)
        if not checkpoint:
            if not getattr(self, "_has_trained", False) and callback is not None:
                refuse_another_run(str(self.args.output_dir))
        elif callback is not None and Path(checkpoint, RECORD).is_file():
            callback.resume(checkpoint)
        self._has_trained = True
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
