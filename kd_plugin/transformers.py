"""Any subclass of ``transformers.Trainer`` as a host: mixins to be put before the trainer that you have.

The teacher panel's is here, the student generating in process. What all share with TRL's trainers, which are
transformers trainers too, is in :mod:`kd_plugin.trainers`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_plugin.divergence import require_finite
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.limits import refuse_images
from kd_plugin.lineage.trainer_callback import LicenseLineageCallback, declared_lineage, with_lineage
from kd_plugin.monitor.run import PanelRun
from kd_plugin.panel.batches import ScoredRollouts
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.in_process import InProcessEngine, Sampling, pad_token
from kd_plugin.rollouts.rows import mixed_seed
from kd_plugin.sharding import through
from kd_plugin.trainers.evaluation import TaskEvaluationMixin
from kd_plugin.trainers.offline import OfflineKDMixin
from kd_plugin.trainers.panel import PanelHostMixin

__all__ = [
    "EvaluationSettings",
    "LicenseLineageCallback",
    "OfflineKDMixin",
    "OfflineSettings",
    "PanelSettings",
    "TaskEvaluationMixin",
    "TeacherPanelMixin",
]
_VALIDATION = -1  # in the place of a step: what is generated at each evaluation is the same


class TeacherPanelMixin(PanelHostMixin):
    """Makes of any ``transformers.Trainer`` one that trains its student on policy, with a panel of teachers.

    Put it before the trainer that you have::

        class MyPanelTrainer(TeacherPanelMixin, MyTrainer): ...

        trainer = MyPanelTrainer(
            model=model, args=args, processing_class=tokenizer, train_dataset=rows, teacher_models={"math": "..."}
        )

    The student generates responses to the prompts of an optimizer step, each row is scored by the teachers that its
    ``teacher_id`` names, and the loss is the divergence from them, summed over the scored tokens and divided once by
    their number in the global batch. It takes the place of your trainer's ``compute_loss``; all else is yours.

    Args:
        model: the student, a loaded (PEFT) model.
        args: your ``TrainingArguments``.
        teacher_models: name to path, hub id, loaded model or teacher; or a ``TeacherPanel``. None takes those of
            ``panel_settings``.
        panel_settings: who is on the panel, how the student generates, and what watches over the run.
        evaluation: your own questions that the student answers at each evaluation.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.
        train_dataset: rows with ``prompt``, text or messages, and ``teacher_id`` (or ``domain``) where the panel has
            several teachers.
        eval_dataset: likewise, or a dictionary of them.
        processing_class: the student's tokenizer.
        callbacks: as ever.
        **kwargs: of your trainer.

    Raises:
        LicenseRefusedError: the terms of a teacher forbid training.
        VocabularyError: a teacher's tokens differ from the student's.
        DataError: ``prompt`` is missing, or a row names a teacher that is not on the panel.
        ConfigError: settings that contradict each other, or a data collator.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        teacher_models: Any = None,
        panel_settings: PanelSettings = PanelSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        lineage: Mapping[str, Any] | str | Path | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> None:
        if model is None or isinstance(model, str) or kwargs.get("model_init") is not None:
            raise ConfigError("The panel needs the student itself, for its lineage: pass a loaded model.")
        if kwargs.get("data_collator") is not None:
            raise ConfigError("Rows are rendered after the student has its prompts: leave data_collator out.")
        if args.n_gpu > 1 or args.fsdp:
            raise ConfigError(
                "TeacherPanelMixin generates in one process a GPU, on weights that are whole or sharded by DeepSpeed. "
                "Launch by torchrun or accelerate; under FSDP use TeacherPanelTrainer or the Lightning callback."
            )
        run = self.gate_panel(
            args,
            PanelRun(panel_settings, teacher_models),
            model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            declared=declared_lineage(callbacks) if lineage is None else lineage,
            evaluation=evaluation,
        )
        self.panel_run.require_draws(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=with_lineage(callbacks, run),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided once, by the tokens of the global batch
        self._noted: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._draws = 0
        tokenizer: Any = self.processing_class
        self.join_panel(
            self._noted,
            tokenizer=tokenizer,
            end_tokens=[tokenizer.eos_token_id],
            pad_token_id=pad_token(tokenizer),
            chat_options=panel_settings.chat_template_kwargs,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the micro-batches of an optimizer step, whose responses are generated and scored at once."""
        fetch = super().get_batch_samples
        batches = self.next_window(
            epoch_iterator,
            lambda: fetch(epoch_iterator, num_batches, device)[0],
            lambda window: [row for batch in window for row in batch],
        )
        if not batches:
            return batches, None
        self.model.train()  # an evaluation may have come before
        step, rows = self.panel_step, self.args.per_device_train_batch_size
        if step.is_warming_up:
            parts: Any = [step.warm_up(i, rows, micro_steps=num_batches, run=len(batches)) for i in range(len(batches))]
            return [{"batch": part} for part in parts], torch.tensor(float(parts[0].scored), device=device)
        scored = self._rolled_out([row for batch in batches for row in batch], rows, step.host.step)
        parts = scored.micro_batches([len(batch) for batch in batches], scored.longest_first())
        tokens = step.host.sum_over_ranks(torch.tensor(float(scored.tokens), device=device))
        return [{"batch": part} for part in parts], tokens

    def _rolled_out(self, rows: Sequence[Mapping[str, Any]], at_once: int, step: int, draw: int = 0) -> ScoredRollouts:
        for row in rows:
            refuse_images((name for name, value in row.items() if value), "A row")
        seed = mixed_seed(self.args.seed, step, self.panel_step.host.rank, draw)
        own = InProcessEngine(
            self.accelerator.unwrap_model(self.model_wrapped),
            self.panel_step.tokenizer,
            Sampling.of(self.panel_settings),
            device=self.accelerator.device,
            seed=seed,
            vocabulary=self._vocabulary,
            together=self.is_deepspeed_enabled and self.accelerator.num_processes > 1,
            repeats=self.panel_settings.repetition_stop,
        )
        counted = None if self.model.training else self.rows_of_its_own(len(rows))
        engine = own if self.server_engine is None else self.server_engine.seeded(seed, own)
        return self.panel_step.roll_out(rows, at_once, engine, draw=draw, counted=counted)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the panel's divergence, a sum over scored tokens divided by their number in the global batch."""
        student = self.accelerator.unwrap_model(model)
        # Inside the forward pass of the wrapper, which gathers weights and readies itself for the backward pass
        loss, _, count = through(model, student)(lambda: self.panel_loss(student, inputs["batch"]))
        if num_items_in_batch is None:
            normalizer = count.clamp(min=1)
        else:  # ranks are averaged
            normalizer = num_items_in_batch.clamp(min=1.0) / self.accelerator.num_processes
        loss = loss / normalizer
        require_finite(loss, "the teacher panel's loss")
        return (loss, None) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the parent does, each time from the same random numbers."""
        self._draws = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Have the responses to a batch generated and scored, and return the loss alone."""
        scored = self._rolled_out(inputs, self.args.per_device_eval_batch_size, _VALIDATION, self._draws)
        self._draws += 1
        (batch,) = scored.micro_batches([len(inputs)])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, {"batch": batch})
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does, with what was seen of the panel since the last log."""
        self.note_panel(logs)
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        logs |= {f"{prefix}{name}": sum(values) / len(values) for name, values in self._noted[mode].items()}
        self._noted[mode].clear()
        super().log(logs, start_time)
