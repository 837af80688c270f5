"""A panel in one run, whichever host trains: its checks and its license gate, what a checkpoint keeps, and its step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from kd_plugin.cache.reader import TeacherCache
from kd_plugin.lineage import RunLineage, Source, outputs_record
from kd_plugin.lineage.start import gate_servers, student_source
from kd_plugin.monitor.watch import LengthAlarm, Monitor
from kd_plugin.panel.anchor import SHARDED_ANCHOR, Anchor, starting_student
from kd_plugin.panel.batches import Host
from kd_plugin.panel.block import panel_from
from kd_plugin.panel.checks import require_correctable, require_defined_panel, require_fitting_student
from kd_plugin.panel.identity import ResumeState
from kd_plugin.panel.sampling import (
    completed,
    own_generation_config,
    require_sampling,
    require_server_engine,
    require_whole_distribution,
)
from kd_plugin.panel.step import PanelStep
from kd_plugin.panel.text.preference import SHARDED_REFERENCE
from kd_plugin.panel.viewing import require_viewable
from kd_plugin.panel.warmup import warmup_objective
from kd_plugin.rollouts.in_process import Sampling
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.teachers.base import adopt_source
from kd_plugin.text.prompts import Templates
from kd_plugin.text.rounds import ROUNDS, RoundWriter
from kd_plugin.upstream import reference_of
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)


class PanelRun:
    """One run of a panel, from its settings to the step that is watched.

    Args:
        settings: with the fields of :class:`~kd_plugin.panel.settings.PanelSettings`.
        teachers: name to teacher, or a ``TeacherPanel``; None takes those of the settings.
        teacher: the only one, as in TRL.

    Attributes:
        panel: the teachers.
        divergence: for teachers without one of their own.
        caches: of the warm-up.
        alarm: None where nothing can ring it.
        lineage: of the run, once the gate is passed.

    Raises:
        ConfigError: no teacher, or a combination that is not defined; nothing is loaded for it.
    """

    def __init__(self, settings: Any, teachers: Any = None, teacher: Any = None) -> None:
        self.settings = settings
        self.panel = panel_from(teacher, teachers, settings)
        self.divergence = self.panel.divergence or settings.resolved_divergence()
        require_defined_panel(self.panel, self.divergence, settings.temperature)
        require_sampling(self.panel, settings)
        require_server_engine(self.panel, settings)
        require_viewable(self.panel, settings.rollouts)
        require_correctable(self.panel, settings.rollouts)
        self.caches = [TeacherCache(path) for path in settings.warmup_caches()]
        if self.caches:
            warmup_objective(self.caches, settings.warmup_divergence)  # a wrong name shows now
        rings = settings.alarm_settings()
        self.alarm = LengthAlarm(rings) if rings.is_set else None
        # The student generates at the temperature that the divergence is taken at, as in TRL
        self.resume = ResumeState(self.panel, self.divergence, settings.temperature, self.alarm)
        self.lineage: RunLineage | None = None
        self._changed: tuple[str, list[str]] = ("", [])

    def gate(
        self, start: Callable[..., RunLineage], model: Any, revision: str | None = None, datasets: Sequence[Source] = ()
    ) -> RunLineage:
        """Pass the license gate.

        Args:
            start: :func:`~kd_plugin.lineage.start.start_run` with the host's settings and declarations.
            model: the student, or where it is.
            revision: branch, tag or commit, for a hub id.
            datasets: datasets with a name.

        Raises:
            LicenseRefusedError: the terms of a source forbid training.
        """
        student = student_source(model, revision)
        for teacher in self.panel.teachers.values():
            adopt_source(teacher, student)
        self.lineage = start(
            method="teacher_panel",
            student=student,
            teachers=[teacher.source for teacher in self.panel.members.values()],
            outputs=[cache.source for cache in self.caches],
            datasets=datasets,
        )
        named = [one.ref or one.name for one in datasets]
        self.lineage.noted["views"] = {
            **self.lineage.noted["views"],
            **{
                name: {**view.identity, **({"datasets": named} if named and view.columns else {})}
                for name, view in self.panel.views.items()
            },
        }
        gate_servers(self.lineage, self.panel.members.values())
        if self.panel.text_teachers:
            self.lineage.noted["templates"] = Templates.load(self.panel.text.templates).identity
        return self.lineage

    @property
    def keeps_start(self) -> bool:
        """Whether the student's start is needed: to stay near it, or to compare a preference with it."""
        return self.settings.anchor_weight > 0.0 or (
            bool(self.panel.text_teachers) and self.panel.text.preference is not None
        )

    @property
    def sharded_start(self) -> str:
        """Why the start cannot be kept where the student is sharded; ``{}`` stands for what shards it."""
        return SHARDED_ANCHOR if self.settings.anchor_weight > 0.0 else SHARDED_REFERENCE

    def require_student(self, model: Any, vocabulary: Vocabulary, config: Callable[[], Any]) -> Vocabulary:
        """Compare the student with the teachers and the caches, before it is loaded.

        Args:
            model: the student, or where it is.
            vocabulary: its own.
            config: returns its transformers configuration.

        Returns:
            The tokens that all heads have a row for.
        """
        return require_fitting_student(
            self.panel,
            vocabulary,
            reference_of(model) or None,
            config,
            self.caches,
            allow_misaligned=self.settings.allow_misaligned,
        )

    def require_draws(self, model: Any) -> None:
        """Refuse a student, generating in process, whose own configuration biases the sampled estimator.

        Raises:
            ConfigError: tokens would not be drawn from its whole distribution.
        """
        engine = self.settings.engine_settings()
        if engine is not None and engine.on_mismatch == "stop":
            return  # servers are told every setting, and take nothing from the checkpoint
        arguments = Sampling.of(self.settings).arguments()
        config = completed(GenerationConfig(), own_generation_config(model))
        config.update(**arguments)
        require_whole_distribution(self.panel, config, self.settings.temperature, arguments)

    def anchor(self, student: Any, vocabulary: Vocabulary) -> Anchor:
        """Keep a student, unwrapped and before its first step, as what it is anchored to."""
        start = starting_student(student, vocabulary)
        return Anchor(start, self.settings.anchor_weight, self.settings.temperature)

    def load(self, state: Mapping[str, Any], where: str) -> None:
        """Go on from a checkpoint; see :meth:`~kd_plugin.panel.identity.ResumeState.load_state_dict`."""
        changed = self.resume.load_state_dict(state, where, allowed=self.settings.allow_changed_panel)
        self._changed = (where, changed)
        self.note_changes()

    def note_changes(self) -> None:
        """Put what changed of the panel into the lineage, once there is one; a checkpoint may be loaded before."""
        where, changed = self._changed
        if self.lineage is None or not changed:
            return
        for change in changed:
            logger.warning("The panel changed since %s: %s.", where, change)
        self.lineage.note_changes([f"panel after {Path(where).name}: {change}" for change in changed])
        self._changed = ("", [])

    def server_engine(
        self, host: Host, student: Any, vocabulary: Vocabulary, end_tokens: Sequence[int], **options: Any
    ) -> ServerEngine | None:
        """Return the servers that generate for the student; None where it generates in the host's process.

        Args:
            host: the trainer.
            student: unwrapped.
            vocabulary: of the run.
            end_tokens: ids that end a response.
            **options: the other arguments of :class:`~kd_plugin.rollouts.vllm.engine.ServerEngine`.

        Raises:
            ConfigError: see there.
        """
        chosen = self.settings.engine_settings()
        if chosen is None:
            return None
        return ServerEngine(chosen, student, host, Sampling.of(self.settings), vocabulary, end_tokens, **options)

    def step(self, host: Host, output_dir: str | Path, *, tokenizer: Any, **options: Any) -> PanelStep:
        """Return the on-policy step of a host, with a monitor that looks on.

        Args:
            host: the trainer.
            output_dir: where rollouts are saved.
            tokenizer: the student's.
            **options: the other arguments of :class:`~kd_plugin.panel.step.PanelStep` that are the host's.
        """
        settings, rounds = self.settings, None
        if self.panel.text_teachers and not self.panel.text.recorded:
            rounds = RoundWriter(
                Path(output_dir, ROUNDS),
                self._text_lineage,
                rank=host.rank,
                answer_column=self.panel.text.answer_column,
            )
        return PanelStep(
            host,
            self.panel,
            settings,
            divergence=self.divergence,
            temperature=settings.temperature,
            tokenizer=tokenizer,
            monitor=Monitor(host, self.panel, settings, tokenizer=tokenizer, output_dir=output_dir, alarm=self.alarm),
            warmup_caches=self.caches,
            rounds=rounds,
            **options,
        )

    def _text_lineage(self) -> dict[str, Any]:
        """Return the nodes and edges of what text teachers wrote, for the dataset that a round is."""
        assert self.lineage is not None
        shown = [one.source for one in self.lineage.datasets]
        teachers = [teacher.source for teacher in self.panel.text_teachers.values()]
        return outputs_record(teachers, shown, config=self.lineage.config)
