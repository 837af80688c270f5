"""Rows for the ready modules: a teacher cache, or prompts."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.nn.utils.rnn import pad_sequence

from kd_plugin.cache.joining import TARGET
from kd_plugin.cache.joint import JointCache
from kd_plugin.cache.loading import CachedRowCollator, ResumableLoader
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.inputs import load_rows
from kd_plugin.lightning.callbacks import NoRows
from kd_plugin.lightning.step import SAMPLES, WINDOW, WINDOW_TOKENS, served, window_end
from kd_plugin.rollouts.vllm.ahead import Lookahead
from kd_plugin.text.dataset import TrainingText
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)
_WINDOWS = itertools.count()  # what tells one window from another


class KDDataModule(LightningDataModule):
    """Serves the rows of a teacher cache, or prompts that the student is to answer.

    Its loaders resume in mid-epoch, assign rows to ranks themselves and look ahead over an accumulation window, so that
    micro-batches of different lengths give the gradient of one large batch.

    Args:
        cache: directory of a teacher cache, for offline KD; or a mapping from directories to weights, an offline panel.
        text: in its place, directory of a capture of text; the rows are tokenized by the module's tokenizer.
        prompts: rows with ``prompt`` (text or messages), with ``teacher_id`` or ``domain`` where the panel needs them,
            and ``completion`` where ``on_policy_fraction`` is below 1: a JSON or Parquet file, a directory of
            ``save_to_disk``, or a hub id.
        validation_rows: rows that are held out, from the end, and measured at validation: cached ones
            against their targets, prompts by letting the student generate and the panel score.
        samples: prompts that are answered at validation, with ``answer`` where the task can be verified; a file,
            directory or hub id like ``prompts``.
        sample_rows: how many of them.
        split: of a hub dataset.
        batch_size: rows of a batch on each rank.
        max_length: tokens kept from the start of a cached row; None keeps all.
        shuffle: new order each epoch.
        seed: of the order.
        num_workers: processes that read rows and gather targets ahead of the step.
        allow_partial: train on a cache whose capture was interrupted.

    Raises:
        ConfigError: none of ``cache``, ``text`` and ``prompts``, or several.
        CacheError: the cache cannot be read, or is not finished.
        DataError: prompts without a column ``prompt``, or no row is left.
    """

    def __init__(
        self,
        cache: dict[str, float] | str | None = None,
        prompts: str | None = None,
        text: str | None = None,
        validation_rows: int = 0,
        samples: str | None = None,
        sample_rows: int = 8,
        split: str = "train",
        batch_size: int = 8,
        max_length: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        allow_partial: bool = False,
    ) -> None:
        super().__init__()
        given = sum(one is not None for one in (cache, prompts, text))
        if given != 1:
            how_many = f"{given} are" if given else "neither is"
            raise ConfigError(f"data.cache, data.text and data.prompts: {how_many} given; name the one to train on.")
        # Lightning would merge them with the module's for the logger, and refuses names that both have
        self.save_hyperparameters(logger=False)
        self.hp: Any = self.hparams
        self.rows: Any = None
        self.validation: Any = None
        self.samples: Any = None
        self._collator: Any = None  # of cached rows

    def setup(self, stage: str) -> None:
        """Open the rows; nothing is copied into memory."""
        hp = self.hp
        if self.rows is None:
            if hp.text is not None:
                rows = self._text_rows()
            else:
                rows = self._cached_rows() if hp.cache is not None else _prompts(hp.prompts, hp.split)
            kept = len(rows) - hp.validation_rows
            if kept < 1:
                raise DataError(
                    f"{hp.cache or hp.text or hp.prompts} has {len(rows)} rows and validation_rows is "
                    f"{hp.validation_rows}, so none is left to train on."
                )
            self.rows = rows.select(range(kept))
            self.validation = rows.select(range(kept, len(rows))) if hp.validation_rows else None
        if hp.samples is not None and self.samples is None:
            rows = _prompts(hp.samples, hp.split)
            self.samples = rows.select(range(min(hp.sample_rows, len(rows))))

    def train_dataloader(self) -> ResumableLoader:
        """Return this rank's batches."""
        prompts = self.hp.prompts is not None
        return self._loader(
            self.rows,
            _as_columns if prompts else self._collator,
            # As Lightning does with its own loaders: the same batches in each epoch
            shuffle=self.hp.shuffle and not getattr(self.trainer, "overfit_batches", 0),
            look_ahead=functools.partial(_attach, self.trainer) if prompts else _count_tokens,
            **self._windows(),
        )

    def val_dataloader(self) -> list[Any]:
        """Return the rows that are held out, and the prompts that are answered."""
        collate = _as_columns if self.hp.prompts is not None else self._collator
        loaders: list[Any] = [] if self.validation is None else [self._loader(self.validation, collate)]
        if self.samples is not None:
            loaders.append(self._loader(self.samples, _as_samples))
        module: Any = getattr(self.trainer, "lightning_module", None)
        if not loaders and getattr(module, "hparams", {}).get("eval_tasks") is not None:
            return [NoRows()]  # so that there is a validation at which they are answered
        return loaders

    def _windows(self) -> dict[str, Any]:
        """Return what tells a loader where the trainer's accumulation windows end."""
        trainer = self.trainer
        if trainer is None:
            return {}
        batches = -(-len(self.rows) // (trainer.world_size * self.hp.batch_size))
        left_out = batches - served(trainer, batches)
        if left_out:
            logger.warning(
                "The last %s of an epoch's %s batches on each rank are left out: %s counts accumulate_grad_batches=%s "
                "batches over epochs, and a step must end with its epoch.",
                *(left_out, batches, type(trainer.strategy).__name__, trainer.accumulate_grad_batches),
            )
        return {"window_end": functools.partial(window_end, trainer), "served": functools.partial(served, trainer)}

    def _loader(self, rows: Any, collate: Any, **options: Any) -> ResumableLoader:
        hp, trainer = self.hp, self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return ResumableLoader(
            rows, collate, hp.batch_size, seed=hp.seed, rank=rank, world=world, num_workers=hp.num_workers, **options
        )

    def _text_rows(self) -> Any:
        module: Any = getattr(self.trainer, "lightning_module", None)
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(
                "data.text needs the student's tokenizer, and the module has none as `tokenizer`. Use OfflineKDModule, "
                "or give the module that attribute."
            )
        self._collator = _TextCollator()
        text = TrainingText.open(self.hp.text, OfflineSettings())
        return text.tokenized(tokenizer, Vocabulary.from_tokenizer(tokenizer).size, self.hp.max_length)

    def _cached_rows(self) -> Any:
        cache, width = JointCache.open(self.hp.cache, allow_partial=self.hp.allow_partial), self.hp.max_length
        self._collator, rows = CachedRowCollator(cache, width), cache.dataset()
        if width is None:
            return rows
        return rows.filter(lambda mask: any(mask[1:width]), input_columns="completion_mask")


@dataclass(frozen=True)
class _TextCollator:
    """Pads tokenized rows on the right."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


def _count_tokens(windows: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """Tell each batch of a window how many tokens all of them score."""
    for window in windows:
        tokens = sum(_scored(batch) for batch in window)
        for batch in window:
            batch[WINDOW_TOKENS] = tokens
        yield window


def _scored(batch: Any) -> int:
    if TARGET in batch:
        return int(batch[TARGET]["positions"].numel())
    return int((batch["labels"][:, 1:] != -100).sum())


def _attach(trainer: Trainer | None, windows: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """Show the first batch of a window all of its prompts, which are answered and scored together, and later ones'.

    Later ones are those that a callback has answered ahead of their optimizer step, as soon as they are fetched.
    """
    further = max((getattr(one, "windows_ahead", 0) for one in getattr(trainer, "callbacks", ())), default=0)
    ahead = Lookahead(further)
    while True:
        window, fetched = ahead.next(windows, lambda: next(windows, []))
        if not window:
            return
        number = next(_WINDOWS)
        first: dict[str, Any] = {"batches": _copies(window)}
        first["fetched"] = [(steps, _copies(later)) for steps, later in fetched] if further else []
        for place, batch in enumerate(window):
            batch[WINDOW] = {"number": number, "place": place, **(first if place == 0 else {})}
        yield window


def _copies(window: list[Any]) -> list[dict[str, Any]]:
    return [dict(batch) for batch in window]


def _as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _as_samples(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tell a module that these are to be answered greedily, and not to be measured."""
    return {**_as_columns(rows), SAMPLES: True}


def _prompts(name: str, split: str) -> Any:
    rows = load_rows(name, split=split)
    if "prompt" not in rows.column_names:
        raise DataError(
            f"{name} has no column 'prompt'; it has {', '.join(map(repr, rows.column_names))}. The student generates "
            "the completions itself, so each row needs the prompt alone, as text or as messages."
        )
    return rows
