"""A teacher panel from a configuration file."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import Callback

from kd_plugin.lightning.module import StudentModule
from kd_plugin.lightning.panel import TeacherPanelCorrection
from kd_plugin.lightning.panel_settings import PanelSettings
from kd_plugin.lightning.step import SAMPLES


class TeacherPanelModule(StudentModule):
    """A student that a panel corrects: :class:`StudentModule` with the callback :class:`TeacherPanelCorrection`.

    Args:
        model: the student, a path or hub id.
        teacher_models: name to path or hub id of each teacher.
        panel: the whole panel in one block, or a path to YAML with it, in the place of the fields about
            teachers.
        combine: how teachers are combined: ``route``, ``weighted_kl``, ``mixture`` or ``confidence``.
        teacher_weights: name to weight, or to a schedule of it.
        domain_weights: domain to such a mapping.
        confidence_temperature: nats, for ``confidence``.
        routes: domain to teacher, for rows with a ``domain`` and no ``teacher_id``.
        estimator: ``exact``, ``sampled`` or ``topk_tail``.
        top_k_tail: tokens that ``topk_tail`` lists of a teacher in this process.
        student_top_k: tokens of the student that ``topk_tail`` lists beside.
        ratio_bounds: for ``sampled``: bounds of the importance ratio.
        panel_values: ``always``, or ``logging`` to compute every teacher's divergence at logging steps only.
        allow_other_eos: take teachers that end their responses with another token than the student.
        allow_changed_panel: resume under another panel than the checkpoint's; the change stands in the lineage.
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd`` or ``skew_kl``; None lets ``beta`` decide, as in
            TRL.
        rollouts: ``student`` writes alone, or ``interleaved`` with the panel at its elbow.
        rollout_draws: ``multinomial`` or ``uniform``, one random number a row.
        interleaved_top_k: rank up to which the panel lets a token stand.
        interleaved_block: tokens that are proposed before the panel is asked.
        on_policy_fraction: share of rows that the student writes, or a schedule of it; ``completion`` fills the
            others.
        warmup_cache: teacher cache, or several with commas between, that the first steps fit offline.
        warmup_cache_steps: how many steps.
        warmup_divergence: divergence of those steps.
        allow_misaligned: warm up on a cache whose targets seem to belong to the token beside, with a warning.
        watch_positions: positions of a micro-batch whose full distributions are compared at logging steps; 0
            for none.
        save_rollouts: rows of each logging step and rank that are kept for ``kd-plugin trace``.
        save_rollouts_top_k: tokens that each teacher would have written, kept with them.
        mask_truncated_completions: leave completions that the limit cut out of the loss.
        repetition_stop: end a rollout that wrote the same sequence so many times in a row; 0 is off.
        anchor_weight: weight of KL(student || its start); 0 is off.
        length_alarm: ring when the mean response length leaves its start by this factor; 0 is off.
        truncation_alarm: ring when this share of responses is cut by the limit; 0 is off.
        repetition_alarm: ring when this share of 4-grams is repeated; 0 is off.
        alarm_window: generation batches that alarms average.
        alarm_action: ``warn``, ``lower_learning_rate`` by ``alarm_factor``, or ``stop`` after a save.
        alarm_factor: what the learning rate is multiplied by.
        beta: 0 forward KL, 1 reverse KL, else JSD.
        skew_alpha: share of the teacher in skew_kl's mixture.
        teacher_model_name_or_path: the only teacher, as in TRL.
        teacher_model_revision: its branch, tag or commit.
        teacher_model_init_kwargs: arguments of ``from_pretrained`` for teachers.
        trust_remote_code: run Python code that a teacher's repository ships.
        shard_teachers: under DeepSpeed ZeRO-1 and 2 too, cut local teachers over all ranks.
        max_completion_length: tokens that the student writes.
        temperature: of writing and of the divergence.
        top_p: nucleus.
        top_k: 0 for no limit.
        min_p: smallest share of the likeliest token's probability.
        repetition_penalty: 1 for none.
        cache_implementation: of ``generate``'s key-value cache.
        generation_kwargs: further arguments of ``generate``.
        chat_template_kwargs: further arguments of ``apply_chat_template``.
        ce_weight: weight of the cross-entropy on what the student wrote.
        seed: of what the student writes.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.
        **kwargs: of :class:`StudentModule`.
    """

    def __init__(
        self,
        model: str,
        teacher_models: dict[str, Any] | None = None,
        panel: dict[str, Any] | str | None = None,
        combine: str = "route",
        teacher_weights: dict[str, Any] | None = None,
        domain_weights: dict[str, Any] | None = None,
        confidence_temperature: float = 1.0,
        routes: dict[str, Any] | None = None,
        estimator: str = "exact",
        top_k_tail: int = 64,
        student_top_k: int | None = None,
        ratio_bounds: tuple[float, float] = (0.5, 2.0),
        panel_values: str = "always",
        allow_other_eos: bool = False,
        allow_changed_panel: bool = False,
        divergence: str | None = None,
        rollouts: str = "student",
        rollout_draws: str = "multinomial",
        interleaved_top_k: int = 25,
        interleaved_block: int = 16,
        on_policy_fraction: float | dict[str, Any] | str | None = None,
        warmup_cache: str | None = None,
        warmup_cache_steps: int = 0,
        warmup_divergence: str = "forward_kl",
        allow_misaligned: bool = False,
        watch_positions: int = 64,
        save_rollouts: int = 0,
        save_rollouts_top_k: int = 5,
        mask_truncated_completions: bool = False,
        repetition_stop: int = 0,
        anchor_weight: float = 0.0,
        length_alarm: float = 0.0,
        truncation_alarm: float = 0.0,
        repetition_alarm: float = 0.0,
        alarm_window: int = 8,
        alarm_action: str = "warn",
        alarm_factor: float = 0.5,
        beta: float = 1.0,
        skew_alpha: float = 0.1,
        teacher_model_name_or_path: str | None = None,
        teacher_model_revision: str | None = None,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        shard_teachers: bool = False,
        max_completion_length: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        cache_implementation: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        ce_weight: float = 0.0,
        seed: int = 0,
        lineage: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.save_hyperparameters()
        passed = {name: self.hparams[name] for name in _PASSED}
        # Built now, so that a wrong setting shows before a model or the trainer is
        self._correction = TeacherPanelCorrection(**passed)

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that has the panel correct; Lightning attaches it."""
        return [self._correction]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Let the student write on prompts that were kept out and the panel judge; answer the samples."""
        if "prompt" not in batch or SAMPLES in batch:
            super().validation_step(batch, batch_idx, dataloader_idx)
            return
        written = self._correction.measure(self, batch, lambda seen: self.model(**seen).loss, batch_idx)
        self.log_accuracy("val/rollout_accuracy", written, batch)


_PASSED = (*(field.name for field in dataclasses.fields(PanelSettings)), "ce_weight", "seed", "lineage")
