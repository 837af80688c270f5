"""What a run on policy shows while it trains: metrics, saved rollouts, and an alarm that acts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_plugin.monitor.alarm import LengthAlarm, response_sums, responses_of
from kd_plugin.monitor.metrics import DivergenceTally, PanelTally, Stopwatch
from kd_plugin.monitor.traces import RolloutSaver
from kd_plugin.panel.batches import MicroBatch
from kd_plugin.panel.combining import group_terms
from kd_plugin.panel.host import Host
from kd_plugin.panel.loss import MicroBatchLoss
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.rollouts.responses import Response
from kd_plugin.signals import OutputHead

logger = logging.getLogger(__name__)


class Monitor:
    """Notices, and acts, when a run goes wrong. Training and evaluation are counted apart.

    Args:
        host: the trainer.
        panel: the teachers.
        settings: what is watched: the fields of :class:`~kd_plugin.panel.watch_fields.WatchFields`.
        tokenizer: the student's.
        output_dir: where rollouts are saved.
        alarm: kept by whoever saves its state; None where nothing can ring it.
    """

    def __init__(
        self,
        host: Host,
        panel: TeacherPanel,
        settings: Any,
        *,
        tokenizer: Any,
        output_dir: str | Path,
        alarm: LengthAlarm | None,
    ) -> None:
        self.host = host
        self.panel = panel
        self.settings = settings
        self.alarm = alarm
        self._divergences = {training: DivergenceTally(panel.names) for training in (True, False)}
        self._tallies = {training: PanelTally(panel.names, settings.watch_positions) for training in (True, False)}
        self._clocks = {training: Stopwatch(host.device) for training in (True, False)}
        self._saver = RolloutSaver(
            output_dir,
            rank=host.rank,
            rows=settings.save_rollouts,
            top_k=settings.save_rollouts_top_k,
            tokenizer=tokenizer,
        )

    @property
    def clock(self) -> Stopwatch:
        """Times what each teacher takes."""
        return self._clocks[self.host.training]

    @property
    def values_are_read(self) -> bool:
        """Whether anything reads the divergences of the present batch."""
        return not self.host.training or self.host.is_logged or self.settings.panel_values == "always"

    @property
    def counted(self) -> bool:
        """Whether anything was seen since the last log; the same on every rank."""
        return self._divergences[self.host.training].counted

    def observe(self, responses: Sequence[Response]) -> None:
        """Look at the responses of a generation batch, over all ranks, and act on an alarm; a collective call."""
        local = torch.tensor(response_sums(responses), dtype=torch.float32, device=self.host.device)
        means = responses_of(self.host.sum_over_ranks(local).tolist())
        noted = {"rollouts/repetition": means.repetition, "rollouts/truncated": means.truncated}
        if self.settings.mask_truncated_completions:
            noted["rollouts/masked"] = means.truncated
        wrong = None
        if self.alarm is not None and self.host.training:
            wrong = self.alarm.observe(means)
            noted["alarm"] = float(wrong is not None)
        self.host.note(noted)
        if wrong is not None:
            self._ring(wrong)

    def see(self, batch: MicroBatch, hidden: Tensor, head: OutputHead, tokens: Tensor, loss: MicroBatchLoss) -> None:
        """Count a micro-batch; where it is logged, compare full distributions and save rollouts. It gathers nothing.

        Args:
            batch: with gathered heads.
            hidden: (N, H) the student's, at the scored positions.
            head: the student's, gathered.
            tokens: (N,) that are scored.
            loss: what the panel's loss made of them.
        """
        training, step = self.host.training, self.host.step
        if self.values_are_read:
            self._divergences[training].add(loss.loss_sum, loss.entropy, loss.by_teacher)
        if not self.host.is_logged:
            return
        hidden = hidden.detach()
        if self.settings.watch_positions:
            groups = group_terms(self.panel, batch.scores, hidden.device, step)
            self._tallies[training].add(groups, hidden, head)
        if self.settings.save_rollouts and training:
            self._saver.save(step + 1, batch, hidden, head, tokens, loss.by_teacher)

    def read_divergences(
        self, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, float], float | None]:
        """Return each teacher's divergence and tokens, and the mean loss in nats per token.

        Args:
            reduce: makes sums of all ranks of a rank's; left out, the host's, which is a collective call.
        """
        reduce = self.host.sum_over_ranks if reduce is None else reduce
        return self._divergences[self.host.training].read(reduce, self.host.device)

    def read(self) -> dict[str, float]:
        """Return what else was seen since the last log; a collective call."""
        found = {f"time/{name}": seconds for name, seconds in self.clock.read().items()}
        if self.settings.watch_positions:
            found |= self._tallies[self.host.training].read(self.host.sum_over_ranks, self.host.device)
        return found

    def _ring(self, wrong: str) -> None:
        action, factor = self.settings.alarm_action, self.settings.alarm_factor
        if action == "stop":
            done = "training stops, and what was learned is saved"
            self.host.stop()
        elif action == "lower_learning_rate":
            done = f"the learning rate is multiplied by {factor}"
            self.host.lower_learning_rate(factor)
        else:
            done = "nothing is done (alarm_action='warn')"
        logger.warning("Alarm at step %s: %s; %s.", self.host.step, wrong, done)
