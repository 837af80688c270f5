"""On-policy distillation from a panel of teachers, for a LightningModule that is there already."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from kd_plugin.cache.loading import ResumableLoader
from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.lightning.callbacks import declared_lineage, lineage_of
from kd_plugin.lightning.panel_host import (
    LightningHost,
    PanelObjective,
    StartKeeper,
    begin_fetched,
    count_of,
    place_of,
    place_under_strategy,
    prepared,
    require_placeable,
    rows_of,
)
from kd_plugin.lightning.step import (
    WINDOW,
    DistillingStep,
    Prepared,
    StudentCallback,
    require_mapping,
    require_whole_windows,
    window_end,
    window_size,
)
from kd_plugin.lightning.student import engine_of, inside_units, shards_the_student
from kd_plugin.limits import refuse_images, refuse_router_loss
from kd_plugin.lineage.start import start_run
from kd_plugin.monitor.run import PanelRun
from kd_plugin.panel.anchor import Anchor
from kd_plugin.panel.batches import MicroBatch, ScoredRollouts
from kd_plugin.panel.checks import (
    check_rows,
    require_one_server,
    require_one_vocabulary,
)
from kd_plugin.panel.sampling import (
    require_same_student,
)
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.in_process import Sampling, pad_token
from kd_plugin.rollouts.rows import mixed_seed
from kd_plugin.rollouts.vllm.engine import ServerEngine
from kd_plugin.settings import built, takes
from kd_plugin.student.forward import Call, DistillingForward
from kd_plugin.student.head import as_trained, config_of, find_student, load_tokenizer, student_rows
from kd_plugin.teachers.base import keeps_start
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)
_VALIDATION = -1  # in the place of a step: what is generated at validation is the same at each
_WAY_OUT = "Let the collator keep 'prompt' as a list, text or messages, with 'teacher_id' beside it for a routed panel."


@takes(PanelSettings)
class TeacherPanelCorrection(StudentCallback):
    """Lets the student generate before a step, has the panel score it, and lets the module train on the scores.

    The batch holds ``prompt``, a list of texts or conversations, and for a routed panel ``teacher_id`` (or
    ``domain``). The module's ``training_step`` is then given ``input_ids``, ``attention_mask`` and ``labels`` of what
    the student generated, padded on the right; the loss becomes ``ce_weight`` times the module's own plus the panel's
    divergence in nats per token. Where the loader is :class:`~kd_plugin.lightning.data.KDDataModule`'s, the responses
    of an accumulation window are generated and scored at once, as in TRL. The step itself is
    :class:`~kd_plugin.panel.step.PanelStep`, and the trainer its host.

    Args:
        teachers: name to path, hub id, loaded model or teacher; or a ``TeacherPanel``. None takes
            ``settings.teacher_models`` or ``settings.panel``.
        student: attribute path of the student, where the module holds several models.
        tokenizer: the student's tokenizer; None reads the one that its ``config`` names.
        ce_weight: weight of the module's own loss.
        seed: of what the student generates.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.

    Raises:
        ConfigError: no teacher, an unknown name, or settings that contradict each other. At setup: as ``OfflineKD``.
        LicenseRefusedError: at setup, the terms of a teacher forbid training.
        VocabularyError: at setup, a teacher's tokens differ from the student's.
        DataError: before the first step, batches have no ``prompt``, or a row names no teacher of the panel.
    """

    loss_name = "the teacher panel's loss"

    def __init__(
        self,
        teachers: Any = None,
        *,
        student: str | None = None,
        tokenizer: Any = None,
        ce_weight: float = 0.0,
        seed: int = 0,
        lineage: Mapping[str, Any] | str | Path | None = None,
        **fields: Any,
    ) -> None:
        self.settings = built(PanelSettings, fields)
        self.panel_run = PanelRun(self.settings, teachers)
        self.panel = self.panel_run.panel
        engine = self.settings.engine_settings()
        self.windows_ahead = 0 if engine is None else engine.max_staleness
        if ce_weight < 0:
            raise ConfigError(f"ce_weight is {ce_weight}; expected a number of at least 0.")
        self.objective = PanelObjective(ce_weight)
        super().__init__(student)
        self.seed = seed
        self.lineage = lineage
        self._given_tokenizer = tokenizer
        self._tokenizer: Any = None
        self._ahead: dict[Any, Prepared] = {}  # by window and place in it, see `_place`
        self._keeper: StartKeeper | None = None
        self._anchor: Anchor | None = None
        self._server_engine: ServerEngine | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, the module, the panel and the licenses; keep the student's start if it is anchored."""
        anchored = stage == "fit" and self.panel_run.keeps_start
        kept = stage == "fit" and any(keeps_start(teacher) for teacher in self.panel.teachers.values())
        if anchored and shards_the_student(trainer):
            raise ConfigError(self.panel_run.sharded_start.format("ZeRO-3 and FSDP2"))
        super().setup(trainer, pl_module, stage)
        if anchored or kept:
            keep = functools.partial(self._keep_start, pl_module, shards=shards_the_student(trainer))
            self._keeper = StartKeeper(pl_module, keep)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the student where it was not there before, load the teachers, and join the student's forward pass."""
        model = find_student(pl_module, self.student)
        if not self._checked:
            self._check(trainer, pl_module, model)
        self._refuse(pl_module, model)
        self.panel_run.require_draws(model)
        require_same_student(self.panel, model)
        if self._anchor is not None:
            place_under_strategy(self._anchor.panel, trainer, pl_module, model, self._vocabulary)
        self._join(trainer, pl_module, model)
        self.panel_run.note_changes()
        assert self._forward is not None
        report = functools.partial(self._report, pl_module)
        self._step = DistillingStep(trainer, pl_module, self._forward, self._next, report)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the teachers for a validation without training."""
        if self._forward is None:
            model = find_student(pl_module, self.student)
            self._vocabulary = require_one_vocabulary(self.panel, self._student_vocabulary(pl_module, model))
            self._join(trainer, pl_module, model)

    def measure(
        self, module: LightningModule, batch: Any, run: Callable[[Any], Tensor | None], batch_idx: int
    ) -> list[str]:
        """Let the student generate on prompts, and log what the panel says of it: means over all response tokens.

        It generates as in training, and at each validation from the same random numbers.

        Args:
            module: the module that validates.
            batch: prompts as in training.
            run: called with ``input_ids``, ``attention_mask`` and ``labels``; must run the student over them, and
                returns its loss.
            batch_idx: number of the batch.

        Returns:
            The responses, as text.
        """
        require_mapping(batch, "prompt", _WAY_OUT)
        assert self._forward is not None
        with module.trainer.precision_plugin.forward_context():
            scored = self._scored(module, [batch], _VALIDATION, batch_idx)
        responses = scored.rollouts.responses
        (part,) = scored.micro_batches([len(responses)])
        ready = prepared(part, None)
        call = Call(ready.target, ready.labels, ready.shape, joint=True)
        with self._forward.step(call):
            own = run(ready.batch)
        rows, tokens = len(responses), call.found.tokens
        divergence = call.found.divergence_sum / max(tokens, 1)
        weight = self.objective.ce_weight
        loss = divergence if weight == 0.0 or own is None else divergence + weight * own.detach()
        log = functools.partial(module.log, sync_dist=True, add_dataloader_idx=False)
        log("val/divergence", divergence, batch_size=tokens)
        log("val/loss", loss, batch_size=tokens)
        log("val/completion_length", sum(len(one.tokens) for one in responses) / rows, batch_size=rows)
        found, _ = self._panel_step.monitor.read_divergences(lambda sums: sums)
        for name in self.panel.teachers:
            count = int(found[f"tokens/{name}"])
            log(f"val/divergence/{name}", found.get(f"divergence/{name}", 0.0), batch_size=count)
        return [self._tokenizer.decode(one.tokens, skip_special_tokens=True) for one in responses]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the rows, where the loader allows it, so that what is missing shows before any step."""
        require_whole_windows(trainer)
        self._panel_step.follow()
        loader: Any = trainer.train_dataloader
        if self.windows_ahead and not isinstance(loader, ResumableLoader):
            raise ConfigError(
                f"rollout_engine: max_staleness is {self.windows_ahead}, and a {type(loader).__name__} does not tell "
                "the rows of coming steps. Use KDDataModule(prompts=...), or set max_staleness: 0."
            )
        dataset: Any = getattr(loader, "dataset", None)
        collate = getattr(loader, "collate_fn", None)
        if "prompt" in (getattr(dataset, "column_names", None) or ()):
            check_rows(dataset, "the train dataset", self.panel)
        elif collate is not None and hasattr(dataset, "__len__") and len(dataset):
            require_mapping(collate([dataset[0]]), "prompt", _WAY_OUT)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the student generate and the panel score, for this batch or for the whole window that begins with it."""
        require_mapping(batch, "prompt", _WAY_OUT)
        refuse_images(batch, "A batch")
        place, step, accumulate = place_of(batch), self._panel_step, trainer.accumulate_grad_batches
        self._begin(trainer, batch)
        if step.is_warming_up:
            rows = getattr(trainer.train_dataloader, "batch_size", None) or count_of(batch)
            cached = step.warm_up(
                batch_idx % accumulate, rows, micro_steps=accumulate, run=window_size(trainer, batch_idx)
            )
            # `scored` is counted over ranks and micro-batches already, and the step sums over ranks
            self._ahead = {place: prepared(cached, cached.scored / trainer.world_size)}
            return
        if place is not None and place in self._ahead:
            return
        window = batch[WINDOW].get("batches") if place is not None else None
        batches = window or [batch]
        with trainer.precision_plugin.forward_context():
            scored = self._scored(pl_module, batches, trainer.global_step, batch_idx % accumulate)
        # A loss that the module forms itself is a mean of each micro-batch: short rows must not count for more in it
        order = scored.longest_first() if self.objective.ce_weight == 0.0 else None
        parts = scored.micro_batches([count_of(one) for one in batches], order)
        # What still waits was made for a window that a loop left early, and is of older weights
        if window is None:  # it is not known: the batch is divided by its own tokens
            self._ahead = {place: prepared(parts[0], None)}
        else:
            number = batch[WINDOW]["number"]
            self._ahead = {(number, i): prepared(part, scored.tokens) for i, part in enumerate(parts)}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was learned if a server ended the run, and leave the module as it was.

        Where ranks hold parts of the student saving takes all of them, and only some may know of the failure.
        """
        if isinstance(exception, ServerError) and trainer.global_step and not shards_the_student(trainer):
            directory = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            path = Path(directory, f"server-step={trainer.global_step}.ckpt")
            if trainer.is_global_zero and trainer.world_size == 1:
                trainer.save_checkpoint(path)
                logger.error("A server is gone. What was learned in %d steps is in %s.", trainer.global_step, path)
        super().on_exception(trainer, pl_module, exception)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss where it is read anyway, and stop if an alarm asks for it."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._panel_step.follow()
        if batch_idx + 1 == window_end(trainer, batch_idx):
            self._host.stop_if_wanted()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a dataset of what text teachers said."""
        self._panel_step.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was, and what was generated for it."""
        super().teardown(trainer, pl_module, stage)
        if self._keeper is not None:
            self._keeper.remove()
        if self._server_engine is not None:
            self._server_engine.finish()
        self._ahead, self._keeper, self._server_engine = {}, None, None

    def state_dict(self) -> dict[str, Any]:
        """Return which panel taught, and what the alarm saw; both are in every checkpoint."""
        return self.panel_run.resume.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: it was trained under another panel, and ``allow_changed_panel`` is not set.
        """
        self.panel_run.load(state_dict, "the checkpoint")

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate, and compare vocabularies and placements; none of it needs any weights."""
        require_placeable(trainer, shard_teachers=self.settings.shard_teachers)
        declared = self.lineage if self.lineage is not None else declared_lineage(trainer)
        settings = {**dict(module.hparams), "panel": self.settings, "ce_weight": self.objective.ce_weight}
        run = self.panel_run.gate(functools.partial(start_run, settings=settings, declared=declared), model)
        lineage_of(trainer, run, self.student)
        self.panel_run.require_draws(model)
        own = self._student_vocabulary(module, model)
        self._vocabulary = self.panel_run.require_student(model, own, lambda: config_of(model))
        self._checked = True

    def _refuse(self, module: LightningModule, student: PreTrainedModel | str) -> None:
        super()._refuse(module, student)
        reason = (
            "A student that returns router logits cannot generate (transformers 5.23 forms that loss at each token)."
        )
        refuse_router_loss(config_of(student), reason)

    def _student_vocabulary(self, module: LightningModule, model: PreTrainedModel | str) -> Vocabulary:
        self._tokenizer = self._given_tokenizer or getattr(module, "tokenizer", None) or load_tokenizer(model)
        return Vocabulary.from_tokenizer(self._tokenizer).within(student_rows(model))

    def _keep_start(self, module: LightningModule, *, shards: bool) -> None:
        model = find_student(module, self.student)
        if not self._checked:
            self._vocabulary = require_one_vocabulary(self.panel, self._student_vocabulary(module, model))
        student = as_trained(module, model)
        if self.panel_run.keeps_start:
            self._anchor = self.panel_run.anchor(student, self._vocabulary)
        for teacher in self.panel.teachers.values():
            if keeps_start(teacher):
                teacher.keep(student, self._vocabulary, sharded_later=shards)  # type: ignore[attr-defined]

    def _join(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel) -> None:
        """Load the teachers, join the panel's step with its host, and patch the student's forward pass."""
        settings, tokenizer = self.settings, self._tokenizer
        require_one_server(self.panel, trainer.strategy.root_device)
        place_under_strategy(
            self.panel, trainer, module, model, self._vocabulary, shard_teachers=settings.shard_teachers
        )
        self._host = LightningHost(trainer, module)
        self._panel_step = self.panel_run.step(
            self._host,
            trainer.default_root_dir,
            tokenizer=tokenizer,
            vocabulary=self._vocabulary,
            end_tokens=[tokenizer.eos_token_id],
            pad_token_id=pad_token(tokenizer),
            seed=self.seed,
            anchor=self._anchor,
            chat_options=settings.chat_template_kwargs,
        )
        student = as_trained(module, model)
        self._server_engine = self.panel_run.server_engine(
            self._host,
            student,
            self._vocabulary,
            [tokenizer.eos_token_id],
            output_dir=trainer.default_root_dir,
            inside=inside_units(module, student),
        )
        objective = dataclasses.replace(self.objective, step=self._panel_step)
        self._forward = DistillingForward(model, self._vocabulary.size, objective, module)

    def _scored(self, module: LightningModule, batches: Sequence[Any], step: int, draw: int) -> ScoredRollouts:
        """Generate and score the responses to all prompts of some batches, as the step and the draw decide."""
        seed = mixed_seed(self.seed, step, self._host.rank, draw)
        own = engine_of(
            module,
            as_trained(module, find_student(module, self.student)),
            self._tokenizer,
            Sampling.of(self.settings),
            seed=seed,
            vocabulary=self._vocabulary,
            repeats=self.settings.repetition_stop,
        )
        rows = rows_of(batches, self.panel.columns)
        engine = own if self._server_engine is None else self._server_engine.seeded(seed, own)
        return self._panel_step.roll_out(rows, count_of(batches[0]), engine, draw=draw)

    def _begin(self, trainer: Trainer, batch: Any) -> None:
        """Have the responses of coming windows generated, where the batch brings their rows."""
        if self.windows_ahead and "fetched" in batch[WINDOW]:
            with trainer.precision_plugin.forward_context():
                assert self._server_engine is not None
                begin_fetched(self._server_engine, self._panel_step, batch, self.seed, trainer.max_steps)

    def _next(self, batch: Any) -> Prepared:
        return self._ahead.pop(place_of(batch))

    def _report(self, module: LightningModule, call: Call, total: Tensor) -> None:
        found, tokens = call.found, max(call.found.tokens, 1)
        values: dict[str, Any] = {"kd/loss": total.detach(), "kd/entropy": found.entropy_sum / tokens}
        if isinstance(call.target, MicroBatch):
            lengths = [len(one.tokens) for one in call.target.responses]
            values["kd/completion_length"] = sum(lengths) / max(len(lengths), 1)
            if self._host.is_logged and not self._ahead:
                divergences, _ = self._panel_step.monitor.read_divergences()
                values |= divergences | self._panel_step.read() | self._host.noted
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=call.shape[0])
