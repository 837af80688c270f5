"""On-policy correction by a panel of teachers, in the place of TRL's ``DistillationTrainer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging
from trl import DistillationTrainer

from kd_plugin.cache import TeacherCache
from kd_plugin.divergence.finite import require_finite
from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.limits import refuse_images, refuse_prompt_learning, refuse_router_loss
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.lineage.start import gate_servers, student_source
from kd_plugin.models import output_rows
from kd_plugin.monitor.metrics import DivergenceTally
from kd_plugin.panel import Correction, TeacherPanel, correction_loss, score_rows
from kd_plugin.panel.build import panel_from
from kd_plugin.panel.checks import (
    check_rows,
    require_adapters_fit,
    require_defined_panel,
    require_one_server,
    require_one_vocabulary,
    require_reachable,
)
from kd_plugin.panel.combining import scored_positions
from kd_plugin.panel.identity import panel_identity
from kd_plugin.panel.sampling import require_sampling
from kd_plugin.panel.warmup import require_fitting
from kd_plugin.rollouts.rows import left_aligned
from kd_plugin.sharding.gathering import whole_heads
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import Teacher
from kd_plugin.trl.evaluation import TokenMeanMixin
from kd_plugin.trl.lineage_callback import LineageSavingMixin, declared_lineage, lineage_callback, with_lineage
from kd_plugin.trl.panel_config import TeacherPanelConfig
from kd_plugin.trl.panel_state import PanelStateCallback, changes_since, save_what_was_learnt
from kd_plugin.trl.placing import place_teachers
from kd_plugin.trl.rollouts import RolloutMixin, require_draws
from kd_plugin.trl.start import (
    load_vocabulary,
    named_datasets,
    require_launchable,
    resumed_checkpoint,
    start_lineage,
    student_config,
)
from kd_plugin.trl.vllm_generation import ask_for_logprobs, padded, recorded, share_evenly
from kd_plugin.trl.watch import WatchMixin

logger = logging.get_logger(__name__)


class TeacherPanelTrainer(LineageSavingMixin, TokenMeanMixin, RolloutMixin, WatchMixin, DistillationTrainer):
    """``DistillationTrainer`` with several teachers, a fused loss, and lineage in every checkpoint.

    The student writes completions; each row is judged by the teachers of the panel that its ``teacher_id``
    names; the student is trained on the weighted divergence from them. Teachers score once for a generation
    batch, and only their last hidden states at the scored positions are kept until the loss.

    Args:
        model: the student: a path, a hub id, or a loaded (PEFT) model, as in TRL.
        teacher_model: the single teacher, as in TRL; the same as ``teacher_models={"teacher": ...}``.
        args: the configuration; a plain ``DistillationConfig`` is not enough for a panel of several.
        train_dataset: rows with ``prompt``, and ``teacher_id`` (or ``domain`` and ``args.routes``) where the
            panel has several teachers.
        eval_dataset: likewise; or several, by name.
        processing_class: the tokenizer, as in TRL, like all that follow.
        callbacks: callbacks.
        optimizers: an optimizer and a scheduler.
        quantization_config: of a student that is given by path.
        peft_config: of an adapter for the student.
        tools: functions that the student may call.
        teacher_models: name to path, hub id, loaded model or :class:`~kd_plugin.teachers.Teacher`; or a
            :class:`~kd_plugin.panel.TeacherPanel`.

    Raises:
        LicenseRefusedError: the terms of a teacher forbid training; raised before any model is loaded.
        VocabularyError: a teacher's tokens differ from the student's.
        DataError: ``prompt`` is missing, or a row names a teacher that is not on the panel.
    """

    _name = "TeacherPanel"
    _tag_names: ClassVar[list[str]] = ["trl", "kd-plugin", "distillation", "teacher-panel"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        args: TeacherPanelConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        *,
        teacher_models: TeacherPanel | Mapping[str, Any] | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "model"
            args = TeacherPanelConfig(f"{name.split('/')[-1]}-TeacherPanel")
        if not isinstance(args, TeacherPanelConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}; TeacherPanelTrainer needs a TeacherPanelConfig, which takes the "
                "same fields."
            )
        self.panel = panel_from(teacher_model, teacher_models, args)
        self.divergence = self.panel.divergence or args.resolved_divergence()
        require_defined_panel(self.panel, self.divergence, args.temperature)
        require_sampling(self.panel, args)
        require_draws(self.panel, args, model)
        refuse_prompt_learning(model, peft_config)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_rows(dataset, name, self.panel)
        warmup_caches = [TeacherCache(path) for path in args.warmup_caches()]

        run = start_lineage(
            method="teacher_panel",
            student=student_source(model, (args.model_init_kwargs or {}).get("revision")),
            teachers=[teacher.source for teacher in self.panel.teachers.values()],
            outputs=[cache.source for cache in warmup_caches],
            datasets=dataset_sources(train_dataset),
            args=args,
            declared=declared_lineage(callbacks),
        )
        gate_servers(run, self.panel.teachers.values())
        require_launchable(args, model, self.panel)
        config = student_config(model, args)
        if config is not None:
            refuse_router_loss(config, "The panel's loss has none, as that of TRL's DistillationTrainer.")
        self._vocabulary = load_vocabulary(model, processing_class, args)
        self._vocabulary = require_one_vocabulary(self.panel, self._vocabulary)
        if isinstance(model, str):
            options = {"revision": (args.model_init_kwargs or {}).get("revision")}
            options["trust_remote_code"] = args.trust_remote_code
            require_adapters_fit(self.panel, model, lambda: AutoConfig.from_pretrained(model, **options))
        require_fitting(warmup_caches, self._vocabulary, allow_misaligned=args.allow_misaligned)
        require_reachable(self.panel)

        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=with_lineage(callbacks, run),
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        if self.use_vllm:
            share_evenly(self.vllm_generation)
            if self._is_sampled:
                ask_for_logprobs(self.vllm_generation, self.temperature)
        # The configuration promised as much; an adapter's directory has none
        self._vocabulary = self._vocabulary.within(output_rows(self.model))
        self.start_rollouts(warmup_caches)
        require_one_server(self.panel, self.accelerator.device)
        place_teachers(self, self.panel, self._vocabulary)
        self._divergences = {mode: DivergenceTally(self.panel.names) for mode in ("train", "eval")}
        self.add_callback(PanelStateCallback(self._identity))
        self.start_watching()

    @property
    def _is_sampled(self) -> bool:
        """Whether a teacher's divergence is estimated from the tokens that the student drew."""
        return any((own.estimator or self.panel.estimator).name == "sampled" for own in self.panel.own.values())

    def _identity(self) -> dict[str, Any]:
        return panel_identity(self.panel, self.divergence, self.temperature)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the parent does.

        Raises:
            ServerError: a teacher's server stayed away; the steps done so far are saved as a checkpoint before.
            ConfigError: the checkpoint was trained under another panel, and ``allow_changed_panel`` is not set; or
                ``output_dir`` holds another run's checkpoints, and this call does not resume.
        """
        checkpoint = resumed_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            changed = changes_since(checkpoint, self._identity(), allowed=self.args.allow_changed_panel)
            for change in changed:
                logger.warning(f"The panel changed since {checkpoint}: {change}.")
            own = lineage_callback(self.callback_handler.callbacks)
            if own is not None and own.run is not None:
                own.run.note_changes([f"panel after {Path(checkpoint).name}: {change}" for change in changed])
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except ServerError:
            save_what_was_learnt(self)
            raise

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in ("teacher_id", "domain", "teacher_weights", "completion"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        for row in inputs:
            refuse_images((name for name, value in row.items() if value), "A row")  # of a stream, or inside its prompt
        assignments = [self.panel.assign(row) for row in inputs]
        self.begin_rollouts(inputs, assignments)
        if self.use_vllm and self._is_sampled:
            with recorded(self.vllm_generation) as found:
                output = self.without_stand_ins(super()._generate_and_score_completions(inputs))
            output["behaviour_logprobs"] = padded(found, output["completion_mask"], cut=self.args.repetition_stop > 0)
        else:
            output = self.without_stand_ins(super()._generate_and_score_completions(inputs))
        loss_mask = output["completion_mask"]
        if "tool_mask" in output:
            loss_mask = loss_mask * output["tool_mask"]
        # Known on the host from here on, so that the training steps wait for nothing
        positions = self.judged_positions(output, loss_mask)
        training = self.model.training
        if not training:
            own = self.rows_of_its_own(len(inputs))
            positions = [scored if row < own else [] for row, scored in enumerate(positions)]
        at_once = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        output["corrections"] = score_rows(
            self.panel,
            assignments,
            *_joined(output),
            completion_start=output["prompt_ids"].size(1),
            positions=positions,
            rows_at_once=at_once,
            clock=self.clock,
            vocabulary=self._vocabulary,
        )
        self.score_start(output, positions, at_once)
        return output

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the panel's divergence, a sum over scored tokens divided by their number in the global batch."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        require_finite(result[0] if return_outputs else result, "the teacher panel's loss")
        return result

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if "warmup" in inputs:
            return self._warmup_loss(unwrapped_student, inputs["warmup"], self._vocabulary.size, num_items_in_batch)
        corrections: list[Correction] = inputs["corrections"]
        spans = [correction.span for correction in corrections]
        ids, mask = left_aligned(*_joined(inputs), spans)
        last = ids.size(1) - 1
        hidden = self._get_last_hidden_state(unwrapped_student, ids, mask, last)
        head = OutputHead.from_model(unwrapped_student, self._vocabulary.size)
        hidden = hidden.to(head.weight.device)
        # The first token of a completion is predicted in the column before it
        prompts = inputs["prompt_ids"].size(1)
        starts = [prompts - span.first - 1 for span in spans]
        hidden_at = scored_positions(corrections, last, hidden.device, starts)
        scored = hidden.reshape(-1, hidden.size(-1)).index_select(0, hidden_at)
        positions = scored_positions(corrections, inputs["completion_ids"].size(1), hidden.device)
        tokens = inputs["completion_ids"].to(hidden.device).reshape(-1).index_select(0, positions)
        values = self._values_are_read()
        behaviour = inputs.get("behaviour_logprobs")
        with whole_heads(self.panel.teachers.values()):
            loss = correction_loss(
                self.panel,
                corrections,
                scored,
                head,
                tokens,
                divergence=self.divergence,
                temperature=self.temperature,
                step=self.state.global_step,
                values=values,
                behaviour_logprobs=None if behaviour is None else behaviour.to(hidden.device).reshape(-1)[positions],
            )
            self.watch_loss(inputs, scored, head, tokens, loss)
        if values:
            self._divergences[self._mode].add(loss.loss_sum, loss.entropy, loss.judgements)
        loss_sum = loss.loss_sum + self.anchor_loss(inputs, scored, head, tokens)
        count = positions.new_full((), positions.numel())
        if self.evaluated is not None:
            self.evaluated.add("loss", loss_sum, count)
            self.evaluated.add("entropy", loss.entropy.sum(), count)
        normaliser = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if isinstance(normaliser, Tensor):
            normaliser = normaliser.to(loss.loss_sum.device)
        return loss_sum / normaliser, loss.entropy.sum(), count

    def _values_are_read(self) -> bool:
        """Whether anything reads this step's divergences: always, unless the configuration leaves them to the log."""
        return self.args.panel_values == "always" or self._logs_this_step()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does, with each teacher's mean divergence (nats a token) and tokens over all ranks."""
        mode = self._mode
        if self._divergences[mode].counted:
            found, loss = self._divergences[mode].read(self._sum_over_ranks, self.accelerator.device)
            for key, value in found.items():
                self._metrics[mode][key].append(value)
            if self.args.panel_values == "logging" and mode == "train" and "loss" in logs and loss is not None:
                logs["loss"] = loss  # of this step: the steps before it had lower bounds
            for key, value in self.watched().items():
                self._metrics[mode][key].append(value)
        super().log(logs, start_time)


def _joined(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return ids and mask of prompts, padded on the left, and completions, padded on the right."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
