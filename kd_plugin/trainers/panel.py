"""The panel of teachers in a transformers trainer, whoever generates for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.divergence import Divergence
from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.evaluation.in_loop import EvaluationSettings, TasksInLoop
from kd_plugin.limits import refuse_prompt_learning, refuse_router_loss
from kd_plugin.lineage import RunLineage
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.models import output_rows
from kd_plugin.monitor.run import PanelRun
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.batches import MicroBatch
from kd_plugin.panel.checks import (
    check_rows,
    require_one_server,
)
from kd_plugin.panel.identity import read_state
from kd_plugin.panel.sampling import (
    require_same_student,
)
from kd_plugin.panel.step import PanelStep
from kd_plugin.panel.warmup import WarmupBatch
from kd_plugin.rollouts.vllm.ahead import Lookahead, begin_windows
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.sharding import through
from kd_plugin.signals import OutputHead
from kd_plugin.trainers.evaluation import TaskEvaluationMixin, TokenMeanMixin
from kd_plugin.trainers.panel_host import (
    PanelStateCallback,
    TrainerHost,
    last_hidden_states,
    place_under_accelerate,
    save_what_was_learned,
)
from kd_plugin.trainers.run import (
    LineageSavingMixin,
    load_vocabulary,
    named_datasets,
    require_launchable,
    resumed_checkpoint,
    start_lineage,
    student_config,
)
from kd_plugin.trainers.upstream import KeptColumnsMixin
from kd_plugin.vocab import Vocabulary

_ROW = ("prompt", "teacher_id", "domain", "teacher_weights", "completion")


class PanelHostMixin(KeptColumnsMixin, TaskEvaluationMixin, TokenMeanMixin, LineageSavingMixin):
    """What a transformers trainer is as the host of the panel's step, whoever generates for it.

    A trainer calls :meth:`gate_panel` before its parent's ``__init__`` and :meth:`join_panel` after it.
    """

    panel: TeacherPanel
    divergence: Divergence
    panel_run: PanelRun
    panel_settings: Any
    panel_step: PanelStep
    server_engine: ServerEngine | None
    _lookahead: Lookahead | None = None
    _vocabulary: Vocabulary

    def gate_panel(
        self,
        args: Any,
        run: PanelRun,
        model: Any,
        *,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        peft_config: Any = None,
        declared: Any = None,
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
    ) -> RunLineage:
        """Pass the license gate, and check all that can be checked before a student is loaded.

        Arguments are the trainer's, but for ``run``, the panel, ``declared``, what the user says of the lineage, and
        ``evaluation``, the questions that are answered at each evaluation.
        """
        self.panel_run, self.panel, self.divergence = run, run.panel, run.divergence
        self.panel_settings = run.settings
        self.own_tasks = TasksInLoop.of(evaluation)
        refuse_prompt_learning(model, peft_config)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_rows(dataset, name, self.panel)
        start = functools.partial(start_lineage, args, run.settings, declared)
        revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
        lineage = run.gate(start, model, revision, dataset_sources(train_dataset))
        require_launchable(args, model, self.panel)
        config = student_config(model, args)
        if config is not None:
            refuse_router_loss(config, "The panel's loss has none.")
        own = load_vocabulary(model, processing_class, args)
        self._vocabulary = run.require_student(model, own, lambda: config)
        return lineage

    def join_panel(self, metrics: Any, **tokens: Any) -> None:
        """Place the teachers, and join the panel's step with this trainer.

        Args:
            metrics: see :class:`~kd_plugin.trainers.panel_host.TrainerHost`.
            **tokens: of :class:`~kd_plugin.panel.step.PanelStep`: the student's tokenizer and what is told of it.

        Raises:
            ConfigError: the student is anchored, and DeepSpeed or FSDP would shard the copy.
        """
        # The configuration promised as much; an adapter's directory has none
        self._vocabulary = self._vocabulary.within(output_rows(self.model))
        require_same_student(self.panel, self.model)
        require_one_server(self.panel, self.accelerator.device)
        place_under_accelerate(self, self.panel, self._vocabulary)
        anchor = None
        if self.panel_run.keeps_start:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ConfigError(self.panel_run.sharded_start.format("DeepSpeed and FSDP"))
            anchor = self.panel_run.anchor(self.accelerator.unwrap_model(self.model), self._vocabulary)
            place_under_accelerate(self, anchor.panel, self._vocabulary)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2 and self.panel_settings.rollout_engine is not None:
            raise ConfigError(
                "rollout_engine under FSDP1, whose flat parameters have no names to send. Use FSDP2: fsdp_config with "
                "version: 2."
            )
        host = TrainerHost(self, metrics)
        student = self.accelerator.unwrap_model(self.model)
        self.server_engine = self.panel_run.server_engine(
            host,
            student,
            self._vocabulary,
            tokens["end_tokens"],
            output_dir=str(self.args.output_dir),
            # A unit of FSDP2 gathers for its own forward pass alone
            **({"inside": through(student, student)} if self.is_fsdp_enabled else {}),
        )
        self.panel_step = self.panel_run.step(
            host,
            str(self.args.output_dir),
            vocabulary=self._vocabulary,
            seed=self.args.seed,
            anchor=anchor,
            **tokens,
        )
        self.add_callback(PanelStateCallback(self.panel_run.resume, self.panel_step.follow))

    def next_window(
        self, iterator: Any, fetch: Callable[[], Any], rows_of: Callable[[Any], Sequence[Mapping[str, Any]]]
    ) -> Any:
        """Return the batches of the present optimizer step; with a rollout engine that may be behind, begin later ones.

        Args:
            iterator: of the epoch.
            fetch: returns the batches of one more step.
            rows_of: returns the rows of a step's batches that the student responds to.
        """
        engine, step = self.server_engine, self.panel_step
        if engine is None or engine.settings.max_staleness == 0:
            return fetch()
        if self._lookahead is None:
            self._lookahead = Lookahead(engine.settings.max_staleness)
        window, fetched = self._lookahead.next(iterator, fetch)
        if window:
            self.model.train()  # an evaluation may have come before
            steps = range(self.panel_settings.warmup_cache_steps, self.state.max_steps)
            begin_windows(
                engine,
                fetched,
                lambda batches: step.responder.prompts(rows_of(batches)),
                steps=steps,
                seed=self.args.seed,
            )
        return window

    def replicated_teacher(self, model: nn.Module) -> nn.Module:
        """Return a teacher where each rank has a replica, under ZeRO-1 and 2."""
        return model.to(self.accelerator.device)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the parent does.

        Raises:
            ServerError: a teacher's server stayed away; the steps done so far are saved as a checkpoint before.
            ConfigError: the checkpoint was trained under another panel, and ``allow_changed_panel`` is not set; or
                ``output_dir`` holds another run's checkpoints, and this call does not resume.
        """
        checkpoint = resumed_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint is not None:
            allowed = self.panel_settings.allow_changed_panel
            self.panel_run.load(read_state(checkpoint, allowed=allowed), checkpoint)
        try:
            done = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except ServerError:
            save_what_was_learned(self)
            raise
        finally:
            if self.server_engine is not None:
                self.server_engine.finish()
        self.panel_step.finish()
        return done

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """Evaluate as the parent does; weights that were sent for it alone are deleted after it."""
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            if self.server_engine is not None and not self.is_in_train:  # type: ignore[attr-defined]
                self.server_engine.finish()

    @property
    def counted_teachers(self) -> Mapping[str, nn.Module]:
        """Models of the teachers in this process, by name."""
        models = {name: getattr(teacher, "model", None) for name, teacher in self.panel.teachers.items()}
        return {name: model for name, model in models.items() if isinstance(model, nn.Module)}

    @property
    def spent(self) -> float:
        """What the teachers' servers were paid so far, on this rank."""
        return self.panel_step.economics.totals(lambda local: local, torch.device("cpu")).spent

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """What the panel reads of a row."""
        return (*_ROW, *self.panel.columns)

    def panel_loss(self, student: nn.Module, batch: MicroBatch | WarmupBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss of a micro-batch, the summed entropy, and the number of scored tokens.

        Call it inside the forward pass of whatever wraps the student.
        """
        hidden = last_hidden_states(student, batch.input_ids, batch.attention_mask)
        found = self.panel_step.loss(hidden, OutputHead.from_model(student, self._vocabulary.size), batch)
        count = torch.tensor(found.tokens).to(hidden.device)
        if self.evaluated is not None:
            self.evaluated.add("loss", found.loss_sum, count)
            self.evaluated.add("entropy", found.entropy_sum, count)
        return found.loss_sum, found.entropy_sum, count

    def note_panel(self, logs: dict[str, float]) -> None:
        """Add what was seen since the last log to the metrics; a collective call."""
        if not self.panel_step.monitor.counted:
            return
        found, loss = self.panel_step.monitor.read_divergences()
        if self.panel_settings.panel_values == "logging" and self.model.training and "loss" in logs:
            logs["loss"] = logs["loss"] if loss is None else loss  # the steps before this one had lower bounds
        self.panel_step.host.note(found | self.panel_step.read())
