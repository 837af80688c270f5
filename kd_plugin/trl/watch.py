"""Metrics, saved rollouts and guards in a TRL trainer: thin hooks over ``kd_plugin.panel``'s metrics, guards, trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from kd_plugin.errors import ConfigError
from kd_plugin.monitor.alarm import LengthAlarm, lower_learning_rate, response_sums, responses_of
from kd_plugin.monitor.metrics import PanelTally, Stopwatch
from kd_plugin.monitor.traces import RolloutSaver
from kd_plugin.panel import Correction, CorrectionLoss, TeacherPanel
from kd_plugin.panel.anchor import Anchor, starting_student
from kd_plugin.panel.combining import group_terms
from kd_plugin.rollouts.responses import Response, StopLoops, as_responses, cut_loops, scored_offsets
from kd_plugin.signals import OutputHead
from kd_plugin.trl.generating import generating
from kd_plugin.trl.placing import place_teachers

logger = logging.get_logger(__name__)
ALARM_STATE = "alarm.json"


class WatchMixin:
    """Adds to the panel's trainer what notices, and what acts, when a run goes wrong.

    The trainer calls :meth:`start_watching` after its parent's ``__init__``, :meth:`judged_positions` between
    generation and scoring, :meth:`watch_loss` and :meth:`anchor_loss` in its loss, and :meth:`watched` when it logs.
    """

    panel: TeacherPanel
    args: Any
    accelerator: Any
    state: Any
    model: Any

    def start_watching(self) -> None:
        """Read the configuration, and keep the student's start where it is anchored to it."""
        self._tallies = {mode: PanelTally(self.panel.names, self.args.watch_positions) for mode in ("train", "eval")}
        self.clock = Stopwatch(self.accelerator.device)
        self._saver = RolloutSaver(
            self.args.output_dir,
            rank=self.accelerator.process_index,
            rows=self.args.save_rollouts,
            top_k=self.args.save_rollouts_top_k,
            tokenizer=self._tokenizer,  # type: ignore[attr-defined]
        )
        self._anchor: Anchor | None = None
        if self.args.anchor_weight > 0.0 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # type: ignore[attr-defined]
            raise ConfigError(
                "anchor_weight keeps a whole copy of the student, and DeepSpeed or FSDP shard it. Name the start as a "
                "teacher of the panel instead: combine='weighted_kl', with the student's own path as one teacher."
            )
        if self.args.anchor_weight > 0.0:
            student = self.accelerator.unwrap_model(self.model)
            start = starting_student(student, self._vocabulary)  # type: ignore[attr-defined]
            place_teachers(self, TeacherPanel({"start": start}), self._vocabulary)  # type: ignore[attr-defined]
            self._anchor = Anchor(start, self.args.anchor_weight, self.temperature)  # type: ignore[attr-defined]
        settings = self.args.alarm_settings()
        self._alarm = LengthAlarm(settings) if settings.is_set else None
        if self._alarm is not None:
            self.add_callback(AlarmStateCallback(self._alarm))  # type: ignore[attr-defined]

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, **kwargs: Any) -> Any:
        repeats = self.args.repetition_stop
        if not repeats:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, **kwargs)  # type: ignore[misc]
        model = self.accelerator.unwrap_model(self.model_wrapped)  # type: ignore[attr-defined]
        longest, multiple = max(map(len, prompt_ids), default=0), self.pad_to_multiple_of or 1  # type: ignore[attr-defined]
        criteria = StoppingCriteriaList([StopLoops(-(-longest // multiple) * multiple, repeats)])
        with generating(model, stopping_criteria=criteria):  # TRL passes no criteria to it (1.16)
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, **kwargs)  # type: ignore[misc]

    def without_loops(self, texts: list[list[int]]) -> list[list[int]]:
        """Cut exactly where the repetition stop says, if it is on, also what vLLM wrote, which was not stopped."""
        if not self.args.repetition_stop:
            return texts
        found, looping = cut_loops(texts, self.args.repetition_stop)
        self._metrics[self._mode]["rollouts/looping"].append(looping)  # type: ignore[attr-defined]
        return found

    def judged_positions(self, output: dict[str, Any], loss_mask: Tensor) -> list[list[int]]:
        """Return for each row which tokens are trained on, look at the responses, and act on an alarm.

        Args:
            output: a generation batch; ``num_items_in_batch`` is set anew where rows leave the loss.
            loss_mask: (B, C) the tokens that the student wrote.
        """
        used, lengths = loss_mask.tolist(), output["completion_mask"].sum(1).tolist()
        ids = [row[:length] for row, length in zip(output["completion_ids"].tolist(), lengths, strict=True)]
        written = output["written"] = as_responses(ids, self.eos_token_ids)  # type: ignore[attr-defined]
        positions = scored_offsets(used, written, mask_truncated=self.args.mask_truncated_completions)
        if self.args.mask_truncated_completions:
            count = torch.tensor(float(sum(map(len, positions))), device=self.accelerator.device)
            output["num_items_in_batch"] = self.accelerator.gather(count).sum()
        self._observe(written)
        return positions

    def _observe(self, written: Sequence[Response]) -> None:
        """Log what the responses are like, over all ranks, and let the alarm see it."""
        local = torch.tensor(response_sums(written), dtype=torch.float32, device=self.accelerator.device)
        responses = responses_of(self.accelerator.reduce(local, reduction="sum").tolist())
        metrics = self._metrics[self._mode]  # type: ignore[attr-defined]
        metrics["rollouts/repetition"].append(responses.repetition)
        if self.args.mask_truncated_completions:
            metrics["rollouts/masked"].append(responses.truncated)
        if self._alarm is None or self._mode == "eval":
            return
        wrong = self._alarm.observe(responses)
        metrics["alarm"].append(float(wrong is not None))
        if wrong is not None:
            self._ring(wrong)

    def _ring(self, wrong: str) -> None:
        action, step = self.args.alarm_action, self.state.global_step
        if action == "stop":
            done = "training stops, and what was learnt is saved"
            self.control.should_training_stop = True  # type: ignore[attr-defined]
            self.control.should_save = True  # type: ignore[attr-defined]
        elif action == "lower_learning_rate":
            factor = self.args.alarm_factor
            done = f"the learning rate is multiplied by {factor}"
            scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # type: ignore[attr-defined]
            lower_learning_rate(self.optimizer, scheduler, factor)  # type: ignore[attr-defined]
        else:
            done = "nothing is done (alarm_action='warn')"
        logger.warning(f"Alarm at step {step}: {wrong}; {done}.")

    def score_start(self, output: dict[str, Any], positions: Sequence[Sequence[int]], rows_at_once: int) -> None:
        """Ask the student's start about a generation batch, where the student is anchored to it."""
        if self._anchor is None:
            return
        output["start"] = self._anchor.score(
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            completion_start=output["prompt_ids"].size(1),
            positions=positions,
            rows_at_once=rows_at_once,
        )

    def anchor_loss(self, inputs: dict[str, Any], hidden: Tensor, head: OutputHead, tokens: Tensor) -> Tensor | float:
        """Return the weighted KL(student || start) of a micro-batch, a sum in nats; 0 where there is no anchor."""
        if self._anchor is None:
            return 0.0
        return self._anchor.loss(inputs["start"], hidden, head, tokens, self._mode)

    def watch_loss(
        self, inputs: dict[str, Any], hidden: Tensor, head: OutputHead, tokens: Tensor, loss: CorrectionLoss
    ) -> None:
        """Compare full distributions and save rollouts, at logging steps."""
        if not self._logs_this_step():
            return
        corrections: list[Correction] = inputs["corrections"]
        hidden, step = hidden.detach(), self.state.global_step
        if self.args.watch_positions:
            self._tallies[self._mode].add(group_terms(self.panel, corrections, hidden.device, step), hidden, head)
        if self.args.save_rollouts and self.model.training:
            self._saver.save(
                step + 1,
                (inputs["prompt_ids"], inputs["prompt_mask"]),
                inputs["written"],
                corrections,
                hidden,
                head,
                tokens,
                loss.judgements,
            )

    def watched(self) -> dict[str, float]:
        """Return what was watched since the last log; called on every rank."""
        device, found = self.accelerator.device, {}
        if self.args.watch_positions:
            found = self._tallies[self._mode].read(self._sum_over_ranks, device)
        if self._anchor is not None:
            found["divergence/start"] = self._anchor.read(self._sum_over_ranks, device, self._mode)
        return found | {f"time/{name}": seconds for name, seconds in self.clock.read().items()}

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _logs_this_step(self) -> bool:
        """Whether the optimizer step that is being made will be logged."""
        if not self.model.training:
            return True
        step, args = self.state.global_step + 1, self.args
        by_step = args.logging_strategy == "steps" and step % max(self.state.logging_steps, 1) == 0
        return by_step or (step == 1 and args.logging_first_step) or 0 < self.state.max_steps <= step


class AlarmStateCallback(TrainerCallback):
    """Keeps what the alarm saw in every checkpoint, so that a resumed run rings when an undisturbed one would."""

    def __init__(self, alarm: LengthAlarm) -> None:
        self._alarm = alarm

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write it, on the process that writes checkpoints."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir():
            (checkpoint / ALARM_STATE).write_text(json.dumps(self._alarm.state()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take it up again."""
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", ALARM_STATE)
        if state.global_step > 0 and path.is_file():
            self._alarm.load(json.loads(path.read_text()))
