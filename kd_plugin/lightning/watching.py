"""Metrics, saved rollouts and guards of a panel run in Lightning, over those of ``kd_plugin.panel``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from kd_plugin.monitor.alarm import LengthAlarm, lower_learning_rate, response_sums, responses_of
from kd_plugin.monitor.metrics import DivergenceTally, PanelTally, Stopwatch
from kd_plugin.monitor.traces import RolloutSaver
from kd_plugin.panel import Correction, CorrectionLoss, TeacherPanel
from kd_plugin.panel.anchor import Anchor
from kd_plugin.panel.combining import group_terms
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.responses import Response
from kd_plugin.signals import OutputHead

logger = logging.getLogger(__name__)


class PanelWatch:
    """Notices, and acts, when a run goes wrong.

    Args:
        panel: the teachers.
        settings: what is watched.
        tokenizer: the student's.
        trainer: the trainer.
        module: the module that trains, on its device.
        alarm: kept by the callback, in whose state it is; None where nothing can ring it.
        anchor: the student's start, or None.
    """

    def __init__(
        self,
        panel: TeacherPanel,
        settings: PanelSettings,
        tokenizer: Any,
        trainer: Trainer,
        module: LightningModule,
        *,
        alarm: LengthAlarm | None,
        anchor: Anchor | None,
    ) -> None:
        self.panel = panel
        self.settings = settings
        self.trainer = trainer
        self.device = module.device
        self.alarm = alarm
        self.anchor = anchor
        self.clock = Stopwatch(module.device)
        self.wants_a_stop = False
        self._divergences = DivergenceTally(panel.names)
        self._tally = PanelTally(panel.names, settings.watch_positions)
        self._saver = RolloutSaver(
            trainer.default_root_dir,
            rank=trainer.global_rank,
            rows=settings.save_rollouts,
            top_k=settings.save_rollouts_top_k,
            tokenizer=tokenizer,
        )
        self._noted: dict[str, float] = {}

    @property
    def logs_this_step(self) -> bool:
        """Whether the optimizer step that is being made will be logged."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    @property
    def values_are_read(self) -> bool:
        """Whether anything reads this step's divergences."""
        return self.settings.panel_values == "always" or self.logs_this_step

    def observe(self, written: Sequence[Response], noted: Mapping[str, float]) -> None:
        """Look at a generation batch, over all ranks, and act on an alarm.

        Args:
            written: its responses.
            noted: further values to log.
        """
        sums = torch.tensor(response_sums(written), dtype=torch.float32, device=self.device)
        responses = responses_of(self._sum_over_ranks(sums).tolist())
        self._noted = {**noted, "rollouts/repetition": responses.repetition, "rollouts/truncated": responses.truncated}
        if self.alarm is not None:
            wrong = self.alarm.observe(responses)
            self._noted["alarm"] = float(wrong is not None)
            if wrong is not None:
                self._ring(wrong)

    def see(
        self,
        corrections: Sequence[Correction],
        prompts: tuple[Tensor, Tensor],
        written: Sequence[Response],
        hidden: Tensor,
        head: OutputHead,
        tokens: Tensor,
        loss: CorrectionLoss,
    ) -> None:
        """Count a micro-batch; at logging steps compare full distributions and save rollouts.

        Heads of sharded teachers must be whole meanwhile.
        """
        if self.values_are_read:
            self._divergences.add(loss.loss_sum, loss.entropy, loss.judgements)
        if not self.logs_this_step:
            return
        hidden, step = hidden.detach(), self.trainer.global_step
        if self.settings.watch_positions:
            self._tally.add(group_terms(self.panel, corrections, hidden.device, step), hidden, head)
        if self.settings.save_rollouts:
            self._saver.save(step + 1, prompts, written, corrections, hidden, head, tokens, loss.judgements)

    def read(self) -> dict[str, float]:
        """Return what was seen since the last log, over all ranks; called on every rank."""
        found, _ = self._divergences.read(self._sum_over_ranks, self.device)
        if self.settings.watch_positions:
            found |= self._tally.read(self._sum_over_ranks, self.device)
        if self.anchor is not None:
            found["divergence/start"] = self.anchor.read(self._sum_over_ranks, self.device)
        return found | self._noted | {f"time/{name}": seconds for name, seconds in self.clock.read().items()}

    def stop_if_wanted(self) -> None:
        """End training after an alarm that asks for it; what was learnt is saved first."""
        if not self.wants_a_stop:
            return
        self.wants_a_stop = False
        self.trainer.should_stop = True
        saving = self.trainer.checkpoint_callback
        directory = getattr(saving, "dirpath", None) or self.trainer.default_root_dir
        self.trainer.save_checkpoint(Path(directory, f"alarm-step={self.trainer.global_step}.ckpt"))

    def _ring(self, wrong: str) -> None:
        action, step = self.settings.alarm_action, self.trainer.global_step
        if action == "stop":
            done = "training stops, and what was learnt is saved"
            self.wants_a_stop = True
        elif action == "lower_learning_rate":
            factor = self.settings.alarm_factor
            done = f"the learning rate is multiplied by {factor}"
            schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            for number, optimizer in enumerate(self.trainer.optimizers):
                lower_learning_rate(optimizer, schedules[number] if number < len(schedules) else None, factor)
        else:
            done = "nothing is done (alarm_action='warn')"
        logger.warning("Alarm at step %s: %s; %s.", step, wrong, done)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[return-value]
