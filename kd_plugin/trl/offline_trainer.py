"""Fit a student to captured teacher outputs, in the place of TRL's ``SFTTrainer``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from peft import PromptLearningConfig
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from kd_plugin.cache import TeacherCache
from kd_plugin.cache.alignment import require_aligned
from kd_plugin.cache.joining import not_in_cache
from kd_plugin.divergence.finite import require_finite
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lineage.start import dataset_sources, student_source
from kd_plugin.trl.collator import TeacherTargetCollator
from kd_plugin.trl.distillation_head import add_distillation_head
from kd_plugin.trl.lineage_callback import LineageSavingMixin, declared_lineage, with_lineage
from kd_plugin.trl.offline_config import OfflineKDConfig
from kd_plugin.trl.start import load_vocabulary, start_lineage

logger = logging.get_logger(__name__)


class OfflineKDTrainer(LineageSavingMixin, SFTTrainer):
    """``SFTTrainer`` whose loss is the divergence from a teacher's captured distributions.

    Rows are joined to the cache by the hash of their token ids, before truncation and packing; from there a
    per-token column ``teacher_index`` travels with the tokens, so that shuffling, truncation, packing and a
    different number of ranks cannot lose the alignment.

    Args:
        model: the student: a path, a hub id, or a loaded (PEFT) model, as in TRL.
        args: the configuration.
        train_dataset: any dataset that ``SFTTrainer`` takes; left out, the rows of the cache.
        eval_dataset: likewise, joined to the same cache.
        processing_class: the tokenizer, as in TRL.
        callbacks: as in TRL.
        teacher_cache: the cache or its directory; left out, ``args.teacher_cache``.
        **kwargs: the remaining arguments of ``SFTTrainer``.

    Raises:
        LicenseRefusedError: the terms of the teacher forbid training; raised before the model is loaded.
        VocabularyError: the cache was captured with another tokenizer.
        CacheError: the cache is incomplete, damaged, or its targets are shifted.
        DataError: rows of a dataset are not in the cache.
    """

    _name = "OfflineKD"
    _tag_names: ClassVar[list[str]] = ["trl", "kd-plugin", "distillation", "offline-kd"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: OfflineKDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        teacher_cache: TeacherCache | str | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "model"
            args = OfflineKDConfig(f"{name.split('/')[-1]}-OfflineKD")
        if not isinstance(args, OfflineKDConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}; OfflineKDTrainer needs an OfflineKDConfig, which takes "
                "the same fields."
            )
        self.teacher_cache = _open_cache(teacher_cache or args.teacher_cache, args)
        run = start_lineage(
            method="offline_kd",
            student=student_source(model, (args.model_init_kwargs or {}).get("revision")),
            outputs=[self.teacher_cache.source],
            datasets=dataset_sources(train_dataset),
            args=args,
            declared=declared_lineage(callbacks),
        )
        vocabulary = load_vocabulary(model, processing_class, args)
        self.teacher_cache.require_compatible(vocabulary, temperature=args.temperature)
        found = require_aligned(self.teacher_cache)
        logger.info(f"The cache's targets give its text {found.logprob[0]:.2f} nats a token; neighbours get less.")
        if train_dataset is None:
            train_dataset = self.teacher_cache.dataset()
            if args.completion_only_loss is None:
                args = copy.copy(args)
                args.completion_only_loss = True
        self._allow_partial = args.allow_partial
        self._keeps_rows_without_targets = args.ce_weight > 0

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=with_lineage(callbacks, run),
            **kwargs,
        )
        if self._is_vision_dataset:
            raise DataError("Offline KD does not join images to a cache. Train on text, or use TRL's SFTTrainer.")
        peft_configs = getattr(self.model, "peft_config", {}).values()
        if any(isinstance(config, PromptLearningConfig) for config in peft_configs):
            raise ConfigError(
                "Prompt-learning PEFT methods shift every position by their virtual tokens, so cached targets would "
                "not fit. Use a weight-based adapter such as LoRA."
            )
        self.data_collator: Any = TeacherTargetCollator(self.data_collator, self.teacher_cache)
        add_distillation_head(
            self.model.get_base_model() if peft_configs else self.model,
            vocab_size=vocabulary.size,
            objective=args.objective(),
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "teacher_index" not in self._signature_columns:
            self._signature_columns.append("teacher_index")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return SFT's loss with the distillation loss in the place of cross-entropy; see :class:`OfflineKDConfig`."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        require_finite(result[0] if return_outputs else result, "the offline KD loss")
        return result

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
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        dataset = self._join(dataset, dataset_name)
        if packing:
            dataset = dataset.select_columns(["input_ids", "labels", "teacher_index"])
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        elif args.max_length is not None:
            cut = copy.copy(args)
            cut.shuffle_dataset = False
            dataset = super()._prepare_dataset(dataset, processing_class, cut, False, None, dataset_name)
            dataset = dataset.map(_cut_index, fn_kwargs={"keep_end": args.truncation_mode == "keep_end"})
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _join(self, dataset: Any, dataset_name: str) -> Any:
        """Add ``teacher_index`` to each row, unless the rows come from a cache and have it."""
        if "teacher_index" in (dataset.column_names or next(iter(dataset))):
            return dataset
        joined = dataset.map(_Join(self.teacher_cache, self._allow_partial or isinstance(dataset, Dataset)))
        if not isinstance(joined, Dataset):
            return joined
        missing = [row for row, index in enumerate(joined["teacher_index"]) if not any(i >= 0 for i in index)]
        if not missing:
            return joined
        if not self._allow_partial:
            raise not_in_cache(
                self.teacher_cache,
                f"{len(missing)} of {len(joined)} rows of the {dataset_name} dataset",
                f"the first is row {missing[0]}",
            )
        logger.warning(f"{len(missing)} of {len(joined)} rows of the {dataset_name} dataset are not in the cache.")
        if self._keeps_rows_without_targets:
            return joined
        return joined.filter(lambda example: any(i >= 0 for i in example["teacher_index"]))


@dataclass(frozen=True)
class _Join:
    """Looks a tokenized row up in the cache by the hash of its token ids."""

    cache: TeacherCache
    allow_missing: bool

    def __call__(self, example: dict[str, Any]) -> dict[str, list[int]]:
        index = self.cache.teacher_index(example["input_ids"])
        if index is None:
            if not self.allow_missing:
                raise not_in_cache(self.cache, "A row of a streamed dataset", f"it starts {example['input_ids'][:8]}")
            index = [-1] * len(example["input_ids"])
        return {"teacher_index": index}


def _cut_index(example: dict[str, Any], keep_end: bool) -> dict[str, Any]:
    length = len(example["input_ids"])
    index = example["teacher_index"]
    return {"teacher_index": index[len(index) - length :] if keep_end else index[:length]}


def _open_cache(cache: TeacherCache | str | None, args: OfflineKDConfig) -> TeacherCache:
    if cache is None:
        raise ConfigError(
            "No teacher cache is given. Make one with `kd-plugin capture` or kd_plugin.capture(...), and pass its "
            "directory as teacher_cache."
        )
    return cache if isinstance(cache, TeacherCache) else TeacherCache(cache, allow_partial=args.allow_partial)
