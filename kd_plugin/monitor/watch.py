"""What a run on policy shows while it trains: metrics, saved rollouts, and an alarm that acts.

The alarm notices rollouts that grow, shrink, run into the limit or repeat themselves.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_plugin.monitor.metrics import DivergenceTally, PanelTally, Stopwatch
from kd_plugin.monitor.traces import RolloutSaver
from kd_plugin.panel.batches import Host, MicroBatch
from kd_plugin.panel.loss import MicroBatchLoss
from kd_plugin.panel.roster import TeacherPanel
from kd_plugin.panel.scoring import group_terms
from kd_plugin.panel.settings import AlarmSettings
from kd_plugin.rollouts.rows import Response, repetition
from kd_plugin.signals import OutputHead

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Responses:
    """What is seen of the responses of a generation batch, over all ranks.

    Attributes:
        length: mean tokens.
        truncated: share that the limit cut.
        repetition: mean share of repeated 4-grams.
    """

    length: float
    truncated: float
    repetition: float


class LengthAlarm:
    """Rings when responses grow, shrink, run into the limit, or repeat themselves, averaged over a window.

    Length inflation and truncation collapse are how on-policy distillation is known to fail (arXiv 2604.08527). After
    it rang it is quiet for a window. It is a function of what it saw, so ranks that see the same agree.
    """

    def __init__(self, settings: AlarmSettings) -> None:
        self.settings = settings
        self._seen: deque[Responses] = deque(maxlen=settings.window)
        self._baseline: float | None = None
        self._quiet = 0

    def observe(self, responses: Responses) -> str | None:
        """Take in a generation batch; return what is wrong, in words, or None."""
        self._seen.append(responses)
        if len(self._seen) < self.settings.window:
            return None
        count = len(self._seen)
        length = sum(r.length for r in self._seen) / count
        truncated = sum(r.truncated for r in self._seen) / count
        repeated = sum(r.repetition for r in self._seen) / count
        if self._baseline is None:
            self._baseline = length
        if self._quiet:
            self._quiet -= 1
            return None
        found = []
        factor, start = self.settings.length, max(self._baseline, 1.0)
        if factor and length > factor * start:
            found.append(f"responses grew from {start:.1f} to {length:.1f} tokens")
        if factor and length * factor < start:
            found.append(f"responses shrank from {start:.1f} to {length:.1f} tokens")
        if self.settings.truncated and truncated >= self.settings.truncated:
            found.append(f"{truncated:.0%} of responses are truncated by the limit")
        if self.settings.repetition and repeated >= self.settings.repetition:
            found.append(f"{repeated:.0%} of 4-grams are repeated")
        if found:
            self._quiet = self.settings.window
        return "; ".join(found) or None

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` goes on from, JSON-ready."""
        seen = [[r.length, r.truncated, r.repetition] for r in self._seen]
        return {"seen": seen, "baseline": self._baseline, "quiet": self._quiet}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._seen = deque((Responses(*values) for values in state["seen"]), maxlen=self.settings.window)
        self._baseline, self._quiet = state["baseline"], state["quiet"]


def lower_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of all groups, and of the schedule that goes on from there, by ``factor``.

    Args:
        optimizer: its groups' rate holds until the schedule sets it anew.
        scheduler: its base rates, which checkpoints keep; None where there is none.
        factor: between 0 and 1.
    """
    if scheduler is not None:
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= factor


def response_sums(responses: Sequence[Response]) -> list[float]:
    """Return rows, tokens, truncated rows and repetition; their sums over all ranks go into :func:`responses_of`."""
    tokens = [one.tokens for one in responses]
    return [len(tokens), sum(map(len, tokens)), sum(one.truncated for one in responses), sum(map(repetition, tokens))]


def responses_of(sums: Sequence[float]) -> Responses:
    """Return the means of :func:`response_sums` for the alarm."""
    rows, tokens, cut, repeated = sums
    rows = max(rows, 1)
    return Responses(tokens / rows, cut / rows, repeated / rows)


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
