"""Batches that are ready for the student's forward pass: what it wrote with the panel's word on it, or cached rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from kd_plugin.lightning.panel_objective import Corrected
from kd_plugin.lightning.step import Prepared
from kd_plugin.lightning.watching import PanelWatch
from kd_plugin.lightning.windows import window_size
from kd_plugin.lightning.writing import Rollouts
from kd_plugin.panel import TeacherPanel, score_rows
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.panel.warmup import CacheWarmup
from kd_plugin.rollouts.responses import as_responses, scored_offsets
from kd_plugin.rollouts.rows import by_length
from kd_plugin.vocab import Vocabulary

_ROW = ("prompt", "completion", "teacher_id", "domain", "teacher_weights")


class Corrector:
    """Has the panel judge what the student wrote.

    Args:
        panel: the teachers.
        settings: what is left out of the loss.
        tokenizer: the student's.
        watch: is shown what training judges; None in a validation without training.
        vocabulary: of the run.
        groups_by_length: whether rows may change places between the batches of a window.
    """

    def __init__(
        self,
        panel: TeacherPanel,
        settings: PanelSettings,
        tokenizer: Any,
        watch: PanelWatch | None,
        vocabulary: Vocabulary,
        *,
        groups_by_length: bool,
    ) -> None:
        self.vocabulary = vocabulary
        self.panel = panel
        self.groups_by_length = groups_by_length
        self.settings = settings
        self.tokenizer = tokenizer
        self.watch = watch

    def judged(
        self,
        rollouts: Rollouts,
        batches: Sequence[Any],
        rows: Sequence[Mapping[str, Any]],
        step: int,
        *,
        training: bool,
        noted: Mapping[str, float] | None = None,
    ) -> list[Prepared]:
        """Have what was written for some batches judged at once, and return them one by one.

        In training, rows of like length may come together, the longest first: a window's batches are one sum.

        Args:
            rollouts: of all their rows.
            batches: prompts.
            rows: all their rows, see :func:`rows_of`.
            step: optimizer step.
            training: whether it is watched and anchored.
            noted: further values to log.
        """
        written = as_responses(rollouts.responses(), [self.tokenizer.eos_token_id])
        mask = self.settings.mask_truncated_completions
        positions = scored_offsets([[1] * n for n in rollouts.lengths], written, mask_truncated=mask)
        watch = self.watch if training else None
        if watch is not None:
            watch.observe(written, noted or {})
        given = rollouts.input_ids, rollouts.attention_mask, rollouts.completion_start, positions, count_of(batches[0])
        clock = None if watch is None else watch.clock
        corrections = score_rows(
            self.panel, [self.panel.assign(row) for row in rows], *given, clock=clock, vocabulary=self.vocabulary
        )
        anchor = None if watch is None else watch.anchor
        started = [] if anchor is None else anchor.score(*given)
        lengths = [sum(of_row) for of_row in zip(rollouts.prompt_lengths, rollouts.lengths, strict=True)]
        order = iter(by_length(lengths) if training and self.groups_by_length else range(len(rows)))
        prepared, window_tokens = [], sum(map(len, positions))
        for batch in batches:
            own = list(itertools.islice(order, count_of(batch)))
            part = rollouts.select(own)
            labels = part.labels()
            for row, b in enumerate(own):
                if not positions[b]:
                    labels[row] = -100
            seen = {"input_ids": part.input_ids, "attention_mask": part.attention_mask, "labels": labels}
            target = Corrected(
                tuple(corrections[b] for b in own),
                part,
                tuple(written[b] for b in own),
                step,
                tuple(started[b] for b in own) if started else (),
                watched=training,
            )
            tokens = sum(len(positions[b]) for b in own)
            prepared.append(Prepared(seen, target, labels, tuple(part.input_ids.shape), tokens, window_tokens))
        return prepared


def warmed(warmup: CacheWarmup, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Prepared:
    """Return cached rows in the place of a batch, whose prompts are passed over."""
    accumulate = trainer.accumulate_grad_batches
    one = warmup.batch(
        trainer.global_step,
        batch_idx % accumulate,
        getattr(trainer.train_dataloader, "batch_size", None) or count_of(batch),
        micro_steps=accumulate,
        run=window_size(trainer, batch_idx),
        rank=trainer.global_rank,
        ranks=trainer.world_size,
    )
    seen = {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}
    seen = {name: tensor.to(module.device) for name, tensor in seen.items()}
    tokens = sum(target["positions"].numel() for target in one.targets)
    # `scored` is counted over ranks and micro-batches already, and the step sums over ranks
    window_tokens = one.scored / trainer.world_size
    return Prepared(seen, one, seen["labels"], tuple(one.input_ids.shape), tokens, window_tokens)


def count_of(batch: Any) -> int:
    """Return the number of prompts in a batch."""
    return len(batch["prompt"])


def rows_of(batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Return all rows of some batches, one mapping each; None where a batch lacks a column."""
    return [{name: _of_row(batch, name, i) for name in _ROW} for batch in batches for i in range(count_of(batch))]


def _of_row(batch: Any, name: str, row: int) -> Any:
    return batch[name][row] if name in batch and batch[name] is not None else None
