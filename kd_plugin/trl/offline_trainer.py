"""Fit a student to captured teacher outputs, in the place of TRL's ``SFTTrainer``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from kd_plugin.cache.completeness import (
    kept_tokens,
    mean_over_taught,
    require_complete,
    survey,
    taught_positions,
    untaught_tokens,
)
from kd_plugin.cache.joining import TARGET
from kd_plugin.cache.joint import Caches, JointCache
from kd_plugin.divergence.finite import require_finite
from kd_plugin.divergence.sparse import SparseLoss
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.limits import refuse_images, refuse_prompt_learning
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.lineage.start import student_source
from kd_plugin.trl.collator import TeacherTargetCollator
from kd_plugin.trl.distillation_head import add_distillation_head
from kd_plugin.trl.evaluation import TokenMeanMixin, TokenMeans
from kd_plugin.trl.lineage_callback import LineageSavingMixin, declared_lineage, with_lineage
from kd_plugin.trl.offline_config import OfflineKDConfig
from kd_plugin.trl.own_rows import readable_rows, with_labels
from kd_plugin.trl.rendering import rendered_as_captured, why_not_found
from kd_plugin.trl.shuffling import shuffle_leanly
from kd_plugin.trl.start import load_vocabulary, named_datasets, require_launchable, start_lineage

logger = logging.get_logger(__name__)


class OfflineKDTrainer(LineageSavingMixin, TokenMeanMixin, SFTTrainer):
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

    Raises:
        LicenseRefusedError: the terms of the teacher forbid training; raised before the model is loaded.
        VocabularyError: the cache was captured with another tokenizer.
        CacheError: the cache is incomplete, damaged, or its targets are shifted.
        ConfigError: a setting would take the targets out of the loss.
        DataError: rows of a dataset are not in the cache.
    """

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
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "model"
            args = OfflineKDConfig(f"{name.split('/')[-1]}-OfflineKD")
        if not isinstance(args, OfflineKDConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}; OfflineKDTrainer needs an OfflineKDConfig, which takes "
                "the same fields."
            )
        args.require_targets_used(compute_loss_func)
        refuse_prompt_learning(model, peft_config)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            refuse_images(dataset.column_names or (), name)
        self.teacher_cache = _open_cache(args.teacher_cache if teacher_cache is None else teacher_cache, args)
        run = start_lineage(
            method="offline_kd",
            student=student_source(model, (args.model_init_kwargs or {}).get("revision")),
            outputs=self.teacher_cache.sources,
            datasets=dataset_sources(train_dataset),
            args=args,
            declared=declared_lineage(callbacks),
        )
        require_launchable(args, model)
        own = load_vocabulary(model, processing_class, args)
        self.teacher_cache.require_compatible(own, temperature=args.temperature)
        self._vocabulary = self.teacher_cache.common(own)
        self.teacher_cache = self.teacher_cache.within(self._vocabulary.size)
        for path, found in self.teacher_cache.require_aligned(allow_misaligned=args.allow_misaligned).items():
            if args.local_process_index == 0:
                print(f"{path}: {found}", file=sys.stderr)
        if train_dataset is None:
            train_dataset = self.teacher_cache.dataset()
            if args.completion_only_loss is None:
                args = copy.copy(args)
                args.completion_only_loss = True
        args = _without_dispatch(args)
        self._allow_partial = args.allow_partial
        self._keeps_rows_without_targets = args.ce_weight > 0

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=with_lineage(callbacks, run),
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        if self._is_vision_dataset:
            raise DataError("Offline KD does not join images to a cache. Train on text, or use TRL's SFTTrainer.")
        peft_configs = getattr(self.model, "peft_config", {}).values()
        refuse_prompt_learning(self.model)  # an adapter of a hub id was not known before
        # Wrapped rows run into each other: a document's first token is trained on, after another's end, and not taught
        partial = args.allow_partial or (args.packing and args.packing_strategy == "wrapped")
        self._untaught = untaught_tokens(partial, args.ce_weight)
        self.data_collator: Any = TeacherTargetCollator(self.data_collator, self.teacher_cache, self._untaught)
        self._used = add_distillation_head(
            self.model.get_base_model() if peft_configs else self.model,
            vocab_size=self._vocabulary.size,
            objective=args.objective(),
        )

    def get_train_dataloader(self) -> Any:
        """Return the host's batches, in its order, without its list of all rows."""
        return shuffle_leanly(super().get_train_dataloader())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the micro-batches of a step, whose divergence is a mean over all tokens of theirs with a target."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._untaught == "keep" and num_items is not None:
            targets = [batch[TARGET] for batch in batches]
            counts = torch.tensor([[target["positions"].numel(), target["taught"]] for target in targets]).sum(0)
            if self.args.average_tokens_across_devices:
                counts = self.accelerator.gather(counts.to(device).view(1, 2)).sum(0)
            mean_over_taught(targets, *counts.tolist())
        return batches, num_items

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self.teacher_cache.columns
        self._signature_columns += [name for name in columns if name not in self._signature_columns]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return SFT's loss with the distillation loss in the place of cross-entropy; see :class:`OfflineKDConfig`."""
        if TARGET not in inputs:
            raise DataError(
                "A batch came without the teacher's targets, so its loss would be plain SFT's. Leave data_collator as "
                "OfflineKDTrainer made it; pass one of your own to the constructor."
            )
        self.args.require_targets_used(self.compute_loss_func or self.label_smoother)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        used, trains = self._used.take(), self.model.training and torch.is_grad_enabled()
        if used is None or (trains and not used.loss_sum.requires_grad):
            raise ConfigError(
                "The batch holds a teacher's targets, and the loss does not come from them: something has replaced the "
                "student's forward pass after OfflineKDTrainer was made, such as a kernel that is patched in when "
                "training starts. Turn it off."
            )
        loss = result[0] if return_outputs else result
        require_finite(loss, "the offline KD loss")
        if self.evaluated is not None:
            self._count_evaluated(self.evaluated, used, inputs[TARGET], loss)
        return result

    def _count_evaluated(self, sums: TokenMeans, used: SparseLoss, target: Mapping[str, Any], loss: Any) -> None:
        """Add a batch without the rows that it repeats."""
        ends, positions = target["ends"], target["positions"].to(used.kd.device)
        own = self.rows_of_its_own(len(ends))
        mine = positions < (ends[own - 1] if own else 0)
        count = mine.sum()
        if self.args.kd_weight > 0:
            taught = taught_positions(target).to(mine.device) & mine
            sums.add("loss", self.args.kd_weight * used.kd[mine].sum(), taught.sum())
        if self.args.ce_weight > 0 and used.nll is not None:
            sums.add("loss/cross_entropy", self.args.ce_weight * used.nll[mine].sum(), count)
        if self.aux_loss_enabled:  # a mean of the batch, not a sum over tokens
            sums.add("loss/router", (loss - used.loss_sum / max(len(positions), 1)) * count, count)
        sums.add("entropy", used.entropy[mine].sum(), count)
        if used.is_top1 is not None:
            sums.add("mean_token_accuracy", used.is_top1[mine].sum(), count)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        # The parent tokenizes whole rows; then they are joined, and only then truncated, packed and shuffled
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = with_labels(dataset, self.teacher_cache.columns, self.completion_only_loss, dataset_name)
        why = why_not_found(self.teacher_cache, processing_class, self.chat_template, dataset)
        with rendered_as_captured(self, self.teacher_cache, processing_class, dataset) as tokenizer:
            dataset = super()._prepare_dataset(dataset, tokenizer, whole, False, formatting_func, dataset_name)
        # Whether packing cuts depends on its strategy; what it splits is trained on
        splits = packing and args.packing_strategy != "bfd"
        window = _Window(None if splits else args.max_length, args.truncation_mode == "keep_end" and not packing)
        dataset = self._join(dataset, dataset_name, window, why)
        if self._vocabulary.is_cut:
            dataset = readable_rows(dataset, self._vocabulary, dataset_name)
        cuts = args.max_length is not None and not (packing and args.packing_strategy == "bfd_split")
        # Each pass over a million rows takes minutes: none where nothing is cut off or left out
        cuts = cuts and _something_to_cut(dataset, args.max_length, dataset_name)
        if packing:
            dataset = dataset.select_columns(["input_ids", "labels", *self.teacher_cache.columns])
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        elif cuts:
            cut = copy.copy(args)
            cut.shuffle_dataset = False
            dataset = super()._prepare_dataset(dataset, processing_class, cut, False, None, dataset_name)
            cut_index = _CutIndex(self.teacher_cache.columns, args.truncation_mode == "keep_end")
            dataset = dataset.map(cut_index)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _join(self, dataset: Any, dataset_name: str, window: _Window, why: str) -> Any:
        """Add the columns ``teacher_index`` to each row, unless the rows come from these caches and have them."""
        columns, cache = self.teacher_cache.columns, self.teacher_cache
        present = dataset.column_names or list(next(iter(dataset)))
        if not set(columns) <= set(present):
            dataset = dataset.map(_Join(cache, window, self._allow_partial or isinstance(dataset, Dataset), why))
        elif "example_id" in present:
            cache.require_own(dataset, dataset_name)
        if not isinstance(dataset, Dataset):
            return dataset
        found = survey(dataset, cache, window.max_length, window.keep_end)
        if not self._allow_partial:
            require_complete(found, cache, dataset_name, why)
        elif found.missing:
            logger.warning(
                f"{found.missing} of {found.tokens} trained tokens of the {dataset_name} dataset have no target, among "
                f"them those of {len(found.absent)} of {found.rows} rows that are not in the cache."
            )
            if not self._keeps_rows_without_targets:
                return dataset.select(found.taught)
        return dataset


@dataclass(frozen=True)
class _Window:
    """Which tokens of a row are left when training has cut it."""

    max_length: int | None
    keep_end: bool


@dataclass(frozen=True)
class _Join:
    """Looks a tokenized row up in the caches by the hash of its token ids."""

    cache: JointCache
    window: _Window
    allow_missing: bool
    why: str

    def __call__(self, example: dict[str, Any]) -> dict[str, list[int]]:
        indices = self.cache.indices(example["input_ids"])
        if not self.allow_missing and all(i < 0 for column in indices.values() for i in column):
            labels = np.asarray(example["labels"])
            kept = kept_tokens(np.array([len(labels)]), self.window.max_length, self.window.keep_end)
            if (labels[kept] != -100).any():
                raise self.cache.missing(example["input_ids"], self.why)
        return indices


@dataclass(frozen=True)
class _CutIndex:
    """Cuts the columns ``teacher_index`` to what truncation left of the tokens."""

    columns: list[str]
    keep_end: bool

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        length = len(example["input_ids"])
        cut = slice(-length, None) if self.keep_end else slice(length)
        return {column: example[column][cut] for column in self.columns}


def _something_to_cut(dataset: Any, max_length: int, dataset_name: str) -> bool:
    """Whether ``max_length`` cuts a row, or a row has no label at all; warn of the targets that are cut off."""
    if not isinstance(dataset, Dataset):
        return True
    counted = [
        (pc.list_value_length(batch["input_ids"]).to_numpy(), _rows_with_labels(batch["labels"]))
        for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000)
    ]
    lengths, labelled = np.concatenate([found for found, _ in counted]), sum(count for _, count in counted)
    longer = int((lengths > max_length).sum())
    if longer:
        logger.warning(
            f"{longer} of {len(lengths)} rows of the {dataset_name} dataset are longer than max_length={max_length}: "
            f"{int((lengths - max_length).clip(min=0).sum())} tokens are cut off, and their targets are not used. The "
            f"longest row has {int(lengths.max())} tokens; max_length=None cuts nothing."
        )
    return longer > 0 or labelled < len(lengths)


def _rows_with_labels(labels: pa.ChunkedArray) -> int:
    rows = pc.list_parent_indices(labels).to_numpy()
    return len(np.unique(rows[pc.list_flatten(labels).to_numpy() != -100]))


def _without_dispatch(args: OfflineKDConfig) -> OfflineKDConfig:
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


def _open_cache(caches: Caches | None, args: OfflineKDConfig) -> JointCache:
    if caches is None:
        raise ConfigError(
            "No teacher cache is given. Make one with `kd-plugin capture` or kd_plugin.capture(...), and pass its "
            "directory as teacher_cache."
        )
    return JointCache.open(caches, allow_partial=args.allow_partial)
