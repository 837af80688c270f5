"""Whose text the panel corrects: the student's, the dataset's, or the student's with the panel at its elbow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule

from kd_plugin.lightning.writing import Rollouts, Sampling, assembled, generated, pad_token, render, responses, writing
from kd_plugin.panel import Assignment, TeacherPanel
from kd_plugin.panel.interleaving import InterleavedSettings, interleaved_responses
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.responses import completion_ids, cut_loops
from kd_plugin.rollouts.rows import mixed_seed, on_policy_rows
from kd_plugin.vocab import Vocabulary


class RolloutWriter:
    """Makes the responses of a generation batch.

    Args:
        settings: who writes, and how.
        panel: at the student's elbow, for ``rollouts="interleaved"``.
        tokenizer: the student's.
        vocabulary: of the run.
        seed: of the run; with the step, the rank and the draw it decides all that is written.
    """

    def __init__(
        self, settings: PanelSettings, panel: TeacherPanel, tokenizer: Any, vocabulary: Vocabulary, seed: int
    ) -> None:
        self.settings = settings
        self.panel = panel
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.seed = seed
        self._fraction = settings.on_policy_schedule()
        self._sampling = dataclasses.replace(Sampling.of(settings), vocabulary=vocabulary)

    def train(
        self,
        module: LightningModule,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        assignments: Sequence[Assignment],
        *,
        draw: int,
        rows_at_once: int,
    ) -> tuple[Rollouts, dict[str, float]]:
        """Return what training corrects, and what is to be logged of it.

        Args:
            module: for its trainer.
            model: the student.
            rows: with ``prompt``, and ``completion`` where the dataset fills rows.
            assignments: for each row who judges it.
            draw: number of the batch in its epoch.
            rows_at_once: rows in a teacher's forward pass.
        """
        trainer, settings, tokenizer = module.trainer, self.settings, self.tokenizer
        step, rank = trainer.global_step, trainer.global_rank
        prompts = render(tokenizer, [row["prompt"] for row in rows], settings.chat_template_kwargs)
        self.vocabulary.require_rows(prompts, "The prompt of row")
        fraction = self._fraction.at(step)
        ours = [True] * len(rows)
        if fraction < 1.0:
            ours = on_policy_rows(len(rows), fraction, seed=self.seed, step=step, rank=mixed_seed(0, 0, rank, draw))
        chosen = [row for row, mine in enumerate(ours) if mine]
        if not chosen and fraction > 0.0:
            chosen = [0]  # sharded students write together; this row's text is not used
        written: dict[int, list[int]] = {}
        logged: dict[str, float] = {}
        if chosen:
            asked = [prompts[row] for row in chosen]
            with writing(module, model, mixed_seed(self.seed, step, rank, draw)):
                if settings.rollouts == "interleaved":
                    judges = [assignments[row] for row in chosen]
                    texts, logged["rollouts/replaced"] = self._interleaved(module, model, asked, judges, rows_at_once)
                else:
                    texts = responses(module, model, tokenizer, asked, self._sampling, settings.repetition_stop)
            if settings.repetition_stop:
                texts, logged["rollouts/looping"] = cut_loops(texts, settings.repetition_stop)
            written = dict(zip(chosen, texts, strict=True))
        answers = [written[i] if mine else self._given(rows[i]) for i, mine in enumerate(ours)]
        return assembled(prompts, answers, pad_token(tokenizer), module.device), logged

    def validate(self, module: LightningModule, model: Any, prompts: Sequence[Any], seed: int) -> Rollouts:
        """Return what the student writes alone, as ``seed`` alone decides."""
        settings, tokenizer = self.settings, self.tokenizer
        rendered = render(tokenizer, prompts, settings.chat_template_kwargs)
        self.vocabulary.require_rows(rendered, "The prompt of row")
        with writing(module, model, seed):
            texts = responses(module, model, tokenizer, rendered, self._sampling, settings.repetition_stop)
        if settings.repetition_stop:
            texts, _ = cut_loops(texts, settings.repetition_stop)
        return assembled(rendered, texts, pad_token(tokenizer), module.device)

    def _given(self, row: Mapping[str, Any]) -> list[int]:
        return completion_ids(
            self.tokenizer,
            row,
            end_tokens=[self.tokenizer.eos_token_id],
            max_length=self.settings.max_completion_length,
            chat_options=self.settings.chat_template_kwargs,
        )

    def _interleaved(
        self,
        module: LightningModule,
        model: Any,
        prompts: Sequence[list[int]],
        judges: Sequence[Assignment],
        rows_at_once: int,
    ) -> tuple[list[list[int]], float]:
        settings = self.settings
        return interleaved_responses(
            self.panel,
            judges,
            prompts,
            lambda ids, mask, count: generated(
                module, model, self.tokenizer, ids, mask, self._sampling, max_new_tokens=count
            ),
            InterleavedSettings(
                max_new_tokens=settings.max_completion_length,
                block=settings.interleaved_block,
                top_k=settings.interleaved_top_k,
                end_tokens=[self.tokenizer.eos_token_id],
                pad_token_id=pad_token(self.tokenizer),
                rows_at_once=rows_at_once,
            ),
            vocabulary=self.vocabulary,
            device=module.device,
            step=module.trainer.global_step,
            seed=self.seed,
            rank=module.trainer.global_rank,
        )
