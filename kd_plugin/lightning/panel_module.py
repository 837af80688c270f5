"""A teacher panel from a configuration file."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from kd_plugin.lightning.module import StudentModule
from kd_plugin.lightning.panel import TeacherPanelCorrection
from kd_plugin.lightning.step import SAMPLES


class TeacherPanelModule(StudentModule):
    """A student that a panel corrects: :class:`StudentModule` with the callback :class:`TeacherPanelCorrection`.

    Args:
        model: the student, a path or hub id.
        teacher_models: name to path or hub id of each teacher.
        panel: the whole panel in one block, or a path to YAML with it, in the place of the fields about teachers.
        combine: how teachers are combined: ``route``, ``weighted_kl``, ``mixture`` or ``confidence``.
        teacher_weights: name to weight, or to a schedule of it.
        domain_weights: domain to such a mapping.
        confidence_temperature: nats, for ``confidence``.
        routes: domain to teacher, for rows with a ``domain`` and no ``teacher_id``.
        estimator: ``exact``, ``sampled`` or ``topk_tail``.
        top_k_tail: tokens that ``topk_tail`` lists of a teacher in this process.
        student_top_k: tokens of the student that ``topk_tail`` lists beside.
        ratio_bounds: for ``sampled``: bounds of the importance ratio.
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd`` or ``skew_kl``; None lets ``beta`` decide, as in TRL.
        beta: 0 forward KL, 1 reverse KL, else JSD.
        skew_alpha: share of the teacher in skew_kl's mixture.
        teacher_model_init_kwargs: arguments of ``from_pretrained`` for teachers.
        max_completion_length: tokens that the student writes.
        temperature: of writing and of the divergence.
        top_p: nucleus.
        top_k: 0 for no limit.
        min_p: smallest share of the likeliest token's probability.
        repetition_penalty: 1 for none.
        generation_kwargs: further arguments of ``generate``.
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
        divergence: str | None = None,
        beta: float = 1.0,
        skew_alpha: float = 0.1,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        max_completion_length: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        generation_kwargs: dict[str, Any] | None = None,
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
        self.verify("val/rollout_accuracy", written, batch)


_PASSED = (
    "teacher_models", "panel", "combine", "teacher_weights", "domain_weights", "confidence_temperature", "routes",
    "estimator", "top_k_tail", "student_top_k", "ratio_bounds", "divergence", "beta", "skew_alpha",
    "teacher_model_init_kwargs", "max_completion_length", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "generation_kwargs", "ce_weight", "seed", "lineage",
)  # fmt: skip
