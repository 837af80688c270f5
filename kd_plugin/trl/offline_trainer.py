"""Fit a student to captured teacher outputs, in the place of TRL's ``SFTTrainer``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.data_utils import pack_dataset

from kd_plugin.cache.joining import Untaught, untaught_tokens
from kd_plugin.cache.joint import Caches, JointCache
from kd_plugin.cache.templates import is_conversation, pinned, pinned_tokenizer
from kd_plugin.cache.training_rows import CutIndex, Window, something_to_cut, why_not_found, with_labels
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.settings import part_of
from kd_plugin.trainers.offline import OfflineKDMixin
from kd_plugin.trl.config import OfflineKDConfig, config_of, require_sft_loss
from kd_plugin.trl.upstream import ASKED_BY, FUSED_HEAD, SummedLossMixin, TrlMetricsMixin

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class OfflineKDTrainer(TrlMetricsMixin, OfflineKDMixin, SummedLossMixin):
    """``SFTTrainer`` whose loss is the divergence from a teacher's captured distributions.

    Rows are joined to the cache by the hash of their token ids, before truncation and packing; from there a
    per-token column ``teacher_index`` travels with the tokens, so that shuffling, truncation, packing and a
    different number of ranks cannot lose the alignment.

    Args:
        model: the student: a path, a hub id, or a loaded (PEFT) model, as in TRL.
        args: the configuration.
        data_collator: as in TRL, if it leaves each row's tokens at the left edge and in their order.
        train_dataset: any dataset that ``SFTTrainer`` takes; left out, the rows of the cache.
        eval_dataset: likewise, joined to the same cache.
        processing_class: the tokenizer, as in TRL.
        compute_loss_func: refused; the loss is the divergence from the teacher.
        compute_metrics: as in TRL, like all that follow.
        callbacks: callbacks.
        optimizers: an optimizer and a scheduler.
        optimizer_cls_and_kwargs: an optimizer's class and its arguments.
        preprocess_logits_for_metrics: called before ``compute_metrics``.
        quantization_config: of a student that is given by path.
        peft_config: of an adapter for the student.
        formatting_func: turns a row into text.
        teacher_cache: the cache or its directory; or an offline panel: a list of them, or a mapping from them to
            weights (see :class:`~kd_plugin.cache.joint.JointCache`). Left out, ``args.teacher_cache``.
        teacher_text: in its place, the directory of a capture of text, on which the student is trained by
            cross-entropy, whatever its tokenizer: what ``SFTTrainer`` does, with the license gate before and the
            lineage after. Left out, ``args.teacher_text``.

    Raises:
        LicenseRefusedError: the terms of the teacher forbid training; raised before the model is loaded.
        VocabularyError: the cache was captured with another tokenizer.
        CacheError: the cache is incomplete, damaged, or its targets are shifted.
        ConfigError: a setting would take the targets out of the loss.
        DataError: rows of a dataset are not in the cache.
    """

    asked_by = ASKED_BY
    adds_router_loss = FUSED_HEAD
    _name = "OfflineKD"
    _tag_names: ClassVar[list[str]] = ["trl", "kd-plugin", "distillation", "offline-kd"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: OfflineKDConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        *,
        teacher_cache: Caches | None = None,
        teacher_text: str | Path | None = None,
    ) -> None:
        args = config_of(OfflineKDConfig, args, model)
        if train_dataset is None and args.completion_only_loss is None:
            args = copy.copy(args)
            args.completion_only_loss = True
        super().__init__(
            model,
            args,
            teacher_cache=args.teacher_cache if teacher_cache is None else teacher_cache,
            teacher_text=args.teacher_text if teacher_text is None else teacher_text,
            offline_settings=args.settings(),
            evaluation=part_of(EvaluationSettings, args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )

    @property
    def untaught(self) -> Untaught:
        """What becomes of tokens with a label and no target."""
        # Wrapped rows run into each other: a document's first token is trained on, after another's end, and not taught
        wrapped = self.args.packing and self.args.packing_strategy == "wrapped"
        return untaught_tokens(self.allow_partial or wrapped, self.objective.ce_weight)

    def require_targets_used(self, args: Any, own_loss: Any = None) -> None:
        """Refuse what makes the trainer form another loss than the one that the student returns; raises ConfigError."""
        super().require_targets_used(args, own_loss)
        require_sft_loss(args)

    def _text_rows(self, processing_class: Any) -> Any:
        """Return the rows of the text as this trainer takes them: TRL tokenizes them."""
        assert self.teacher_text is not None
        return self.teacher_text.rows

    def prepare_rows(self, dataset: Any, name: str) -> Any:
        """Return the rows as they are: they are joined once they are tokenized, and before they are cut and packed."""
        return dataset

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        if self.teacher_text is not None:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # The parent tokenizes whole rows; then they are joined, and only then truncated, packed and shuffled
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = with_labels(dataset, self.teacher_cache.columns, self.completion_only_loss, dataset_name)
        why = why_not_found(self.teacher_cache, processing_class, self.chat_template, dataset)
        with _rendered_as_captured(self, self.teacher_cache, processing_class, dataset) as tokenizer:
            dataset = super()._prepare_dataset(dataset, tokenizer, whole, False, formatting_func, dataset_name)
        # Whether packing cuts depends on its strategy; what it splits is trained on
        splits = packing and args.packing_strategy != "bfd"
        window = Window(None if splits else args.max_length, args.truncation_mode == "keep_end" and not packing)
        dataset = self.joining(dataset, dataset_name, window, why)
        cuts = args.max_length is not None and not (packing and args.packing_strategy == "bfd_split")
        # Each pass over a million rows takes minutes: none where nothing is cut off or left out
        cuts = cuts and something_to_cut(dataset, args.max_length, dataset_name)
        if packing:
            dataset = dataset.select_columns(["input_ids", "labels", *self.teacher_cache.columns])
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        elif cuts:
            cut = copy.copy(args)
            cut.shuffle_dataset = False
            dataset = super()._prepare_dataset(dataset, processing_class, cut, False, None, dataset_name)
            dataset = dataset.map(CutIndex(self.teacher_cache.columns, args.truncation_mode == "keep_end"))
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


@contextmanager
def _rendered_as_captured(trainer: Any, cache: JointCache, processing_class: Any, dataset: Any) -> Iterator[Any]:
    """Have TRL's preparation of ``dataset`` print the time that the capture printed.

    Args:
        trainer: whose ``chat_template`` (TRL 1.16) is the training template that TRL renders with in the place of the
            tokenizer's own, or None.
        cache: what the rows will be joined with.
        processing_class: the tokenizer, whose own template, which is saved, is left alone.
        dataset: the rows; nothing is rendered where they are no conversations.

    Yields:
        The tokenizer to prepare the dataset with.

    Raises:
        ConfigError: the caches printed different times, so that no row can be found in all of them.
    """
    if not is_conversation(next(iter(dataset))):
        yield processing_class
        return
    moment, own = cache.rendered_at, trainer.chat_template
    trainer.chat_template = own if own is None or moment is None else pinned(own, moment)
    try:
        yield pinned_tokenizer(processing_class, moment)
    finally:
        trainer.chat_template = own
