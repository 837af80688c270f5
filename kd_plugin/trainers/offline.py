"""Offline KD for any subclass of ``transformers.Trainer``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from kd_plugin.cache.joining import TARGET, Untaught, mean_over_taught, untaught_tokens
from kd_plugin.cache.joint import Caches, JointCache
from kd_plugin.cache.loading import TeacherTargetCollator
from kd_plugin.cache.training_rows import Joining, columns_of, with_labels
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.divergence.projection import require_finite
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.evaluation.in_loop import EvaluationSettings, TasksInLoop
from kd_plugin.limits import refuse_images, refuse_label_smoothing, refuse_prompt_learning, refuse_router_loss
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.lineage.start import student_source
from kd_plugin.lineage.trainer_callback import declared_lineage, with_lineage
from kd_plugin.student.head import DistillationHead, evaluation_sums
from kd_plugin.text.dataset import TrainingText
from kd_plugin.trainers.evaluation import TaskEvaluationMixin, TokenMeanMixin
from kd_plugin.trainers.run import (
    LineageSavingMixin,
    load_vocabulary,
    named_datasets,
    require_launchable,
    start_lineage,
)
from kd_plugin.trainers.upstream import KeptColumnsMixin, shuffle_leanly


class OfflineKDMixin(KeptColumnsMixin, TaskEvaluationMixin, TokenMeanMixin, LineageSavingMixin):
    """Makes of any ``transformers.Trainer`` one that fits its student to captured teacher outputs.

    Put it before the trainer that you have::

        class MyOfflineTrainer(OfflineKDMixin, MyTrainer): ...

        trainer = MyOfflineTrainer(model=model, args=args, processing_class=tokenizer, teacher_cache="cache")

    The student's forward pass returns the divergence in the place of cross-entropy, summed over the tokens with a label
    and divided once by their number in the global batch. All else is your trainer's. It works where your
    ``compute_loss`` takes the loss that ``model(**inputs)`` returns.

    Rows are joined to the cache by the hash of their token ids; from there a per-token column ``teacher_index`` travels
    with the tokens. So rows are whole and tokenized: ``input_ids`` and ``labels``, -100 where nothing is trained.

    Args:
        model: the student, a loaded (PEFT) model.
        args: your ``TrainingArguments``.
        teacher_cache: the cache or its directory; or an offline panel: a list of them, or a mapping from them to
            weights (see :class:`~kd_plugin.cache.joint.JointCache`).
        teacher_text: in its place, the directory of a capture of text: the student is trained on what the teacher
            wrote, by cross-entropy, with any tokenizer; the loss and all else is your trainer's own.
        offline_settings: how the targets are fitted: the divergence, its temperature, its weight beside cross-entropy.
        evaluation: your own questions that the student answers at each evaluation.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.
        train_dataset: a ``datasets.Dataset`` or stream of tokenized rows; left out, the rows of the cache or the text.
        eval_dataset: likewise, or a dictionary of them, joined to the same cache.
        data_collator: one that pads on the right, or puts the examples of a batch into one row
            (``DataCollatorWithFlattening``); left out, ``DataCollatorForSeq2Seq``.
        processing_class: the student's tokenizer.
        callbacks: as ever.
        **kwargs: of your trainer.

    Raises:
        LicenseRefusedError: the terms of the teacher forbid training.
        VocabularyError: the cache was captured with another tokenizer.
        CacheError: the cache is incomplete, damaged, or its targets are shifted.
        ConfigError: a setting would take the targets out of the loss, or is not supported.
        DataError: rows of a dataset are not in the cache, or cannot be joined.
    """

    asked_by = "labels"  # the argument by which the trainer asks the student for its loss
    adds_router_loss = False  # whether the trainer adds that of a mixture of experts to what the student returns

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        teacher_cache: Caches | None = None,
        teacher_text: str | Path | None = None,
        offline_settings: OfflineSettings = OfflineSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        lineage: Mapping[str, Any] | str | Path | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> None:
        self.objective, self.allow_partial = offline_settings.objective(), offline_settings.allow_partial
        self.require_targets_used(args, kwargs.get("compute_loss_func"))
        self.own_tasks = TasksInLoop.of(evaluation)
        if model is None or kwargs.get("model_init") is not None:
            raise ConfigError("Offline KD needs the student itself, for its lineage: pass model, not model_init.")
        refuse_prompt_learning(model, kwargs.get("peft_config"))
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            refuse_images(columns_of(dataset), name)
        self.teacher_text: TrainingText | None = None
        if teacher_text is not None:
            self.teacher_text = TrainingText.open(teacher_text, offline_settings, teacher_cache)
            sources = [self.teacher_text.source]
        else:
            self.teacher_cache = JointCache.open(teacher_cache, allow_partial=self.allow_partial)
            sources = self.teacher_cache.sources
        run = start_lineage(
            args,
            offline_settings,
            declared_lineage(callbacks) if lineage is None else lineage,
            method="offline_kd",
            student=student_source(model, (getattr(args, "model_init_kwargs", None) or {}).get("revision")),
            outputs=sources,
            datasets=dataset_sources(train_dataset),
        )
        require_launchable(args, model)
        own = load_vocabulary(model, processing_class, args)
        if self.teacher_text is not None:
            self._vocabulary = own
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=self._text_rows(processing_class) if train_dataset is None else train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=with_lineage(callbacks, run),
                **kwargs,
            )
            self.data_collator: Any = _padding_labels(self.data_collator, data_collator)
            return
        fitted = self.teacher_cache.for_student(own, temperature=self.objective.temperature)
        self.teacher_cache, self._vocabulary = fitted
        aligned = self.teacher_cache.require_aligned(allow_misaligned=offline_settings.allow_misaligned)
        for path, found in aligned.items():
            if args.local_process_index == 0:
                print(f"{path}: {found}", file=sys.stderr)
        if train_dataset is None:
            train_dataset = self.teacher_cache.dataset()
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self.prepare_rows(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self.prepare_rows(eval_dataset, "eval")
        super().__init__(
            model=model,
            args=_without_dispatch(args),
            data_collator=data_collator,
            train_dataset=self.prepare_rows(train_dataset, "train"),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=with_lineage(callbacks, run),
            **kwargs,
        )
        refuse_prompt_learning(self.model)  # an adapter of a hub id was not known before
        collator: Any = _padding_labels(self.data_collator, data_collator)
        self.data_collator = TeacherTargetCollator(collator, self.teacher_cache, self.untaught)
        base = self.model.get_base_model() if getattr(self.model, "peft_config", None) else self.model
        if not self.adds_router_loss:
            refuse_router_loss(base.config, "The divergence takes the place of the loss that has it.")
        self._head = DistillationHead(
            base, vocab_size=self._vocabulary.size, objective=self.objective, asked_by=self.asked_by
        )
        self.model_accepts_loss_kwargs = True  # the head does, whatever the model's own forward pass takes

    @property
    def untaught(self) -> Untaught:
        """What becomes of tokens with a label and no target."""
        return untaught_tokens(self.allow_partial, self.objective.ce_weight)

    @property
    def joining(self) -> Joining:
        """How rows are joined to the cache."""
        return Joining(self.teacher_cache, self._vocabulary, self.allow_partial, self.objective.ce_weight > 0)

    def _text_rows(self, processing_class: Any) -> Any:
        """Return the rows of the text as this trainer takes them: tokenized."""
        assert self.teacher_text is not None
        if processing_class is None:
            raise ConfigError("teacher_text needs the student's tokenizer: pass processing_class.")
        return self.teacher_text.tokenized(processing_class, self._vocabulary.size)

    def prepare_rows(self, dataset: Any, name: str) -> Any:
        """Return a dataset with labels, where it is the cache's, and with the columns that point to its targets."""
        return self.joining(with_labels(dataset, self.teacher_cache.columns, True, name), name)

    def require_targets_used(self, args: Any, own_loss: Any = None) -> None:
        """Refuse what makes the trainer form another loss than the one that the student returns.

        Args:
            args: the trainer's settings.
            own_loss: a function that forms the loss from logits, or None.

        Raises:
            ConfigError: the targets would not be used, or not as they are.
        """
        if own_loss is not None:
            raise ConfigError(
                "compute_loss_func (or a label smoother) forms the loss from logits, so the teacher's targets would "
                "not be used. Leave it out: kd_weight and ce_weight mix distillation and cross-entropy. For another "
                "loss use the trainer that this one stands on."
            )
        refuse_label_smoothing(args)
        if args.n_gpu > 1:
            raise ConfigError(
                f"One process sees {args.n_gpu} GPUs, so batches would be cut by rows (DataParallel); cached targets "
                "are one a scored position. Launch one process a GPU: torchrun --nproc_per_node, or accelerate launch."
            )

    def get_train_dataloader(self) -> Any:
        """Return the host's batches, in its order, without its list of all rows."""
        return shuffle_leanly(super().get_train_dataloader())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the micro-batches of a step, whose divergence is a mean over all tokens of theirs with a target."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teacher_text is None and self.untaught == "keep" and num_items is not None:
            targets = [batch[TARGET] for batch in batches]
            counts = torch.tensor([[target["positions"].numel(), target["taught"]] for target in targets]).sum(0)
            if self.args.average_tokens_across_devices:
                counts = self.accelerator.gather(counts.to(device).view(1, 2)).sum(0)
            mean_over_taught(targets, *counts.tolist())
        return batches, num_items

    @property
    def kept_columns(self) -> list[str]:
        """The columns that point to the targets; the collator takes them out."""
        return [] if self.teacher_text is not None else self.teacher_cache.columns

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's loss with the distillation loss in the place of cross-entropy."""
        if self.teacher_text is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        name = type(self).__name__
        if TARGET not in inputs:
            raise DataError(
                "A batch came without the teacher's targets, so its loss would be plain cross-entropy. Leave "
                f"data_collator as {name} made it; pass one of your own to the constructor."
            )
        self.require_targets_used(self.args, self.compute_loss_func or self.label_smoother)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        used, trains = self._head.take(), self.model.training and torch.is_grad_enabled()
        if used is None or (trains and not used.loss_sum.requires_grad):
            raise ConfigError(
                "The batch holds a teacher's targets, and the loss does not come from them: something has replaced the "
                f"student's forward pass after {name} was made, such as a kernel that is patched in when training "
                "starts. Turn it off."
            )
        loss = result[0] if return_outputs else result
        require_finite(loss, "the offline KD loss")
        if self.evaluated is not None:
            target = inputs[TARGET]
            sums = evaluation_sums(self.objective, used, target, self.rows_of_its_own(len(target["ends"])))
            if getattr(self, "aux_loss_enabled", False):  # a mean of the batch, not a sum over tokens
                count = sums["entropy"][1]
                sums["loss/router"] = (loss - used.loss_sum / max(len(target["positions"]), 1)) * count, count
            for quantity, (total, count) in sums.items():
                self.evaluated.add(quantity, total, count)
        return result

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Evaluate a batch as the parent does; logits are formed where they are asked for, and nowhere else."""
        if self.teacher_text is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._head.forms_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._head.forms_logits = False


def _padding_labels(made: Any, given: Any) -> Any:
    """Return the trainer's collator; where it made one that pads no labels, one that does."""
    if given is None and isinstance(made, DataCollatorWithPadding):
        return DataCollatorForSeq2Seq(made.tokenizer)
    return made


def _without_dispatch(args: Any) -> Any:
    """Let each rank collate its own batches.

    Accelerate's default for a stream is that the first rank collates for all and cuts every tensor by rows, which
    would tear the targets, one a scored position, from their rows.

    Raises:
        ConfigError: the user asks for that dispatch.
    """
    if args.accelerator_config.dispatch_batches:
        raise ConfigError(
            "accelerator_config has dispatch_batches=True, which cuts batches by rows; cached targets are one a scored "
            "position. Leave dispatch_batches out or set it to false."
        )
    own = copy.copy(args)
    own.accelerator_config = replace(args.accelerator_config, dispatch_batches=False)
    return own
