"""On-policy correction by a panel of teachers, for a LightningModule that is there already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from kd_plugin.errors import ConfigError
from kd_plugin.lightning.callback import StudentCallback
from kd_plugin.lightning.forward import Call, DistillingForward
from kd_plugin.lightning.lineage import declared_lineage, lineage_of
from kd_plugin.lightning.offline import load_tokenizer
from kd_plugin.lightning.panel_objective import Corrected, PanelFound, PanelObjective
from kd_plugin.lightning.panel_settings import PanelSettings
from kd_plugin.lightning.placing import place_teachers, require_placeable
from kd_plugin.lightning.step import WINDOW, DistillingStep, Prepared, require_mapping
from kd_plugin.lightning.student import find_student
from kd_plugin.lightning.writing import Rollouts, render, texts, write
from kd_plugin.lineage.start import start_run, student_source
from kd_plugin.panel import score_rows
from kd_plugin.panel.build import panel_from, require_sampling
from kd_plugin.panel.checks import check_rows, require_defined_panel, require_one_vocabulary
from kd_plugin.panel.rollouts import mixed_seed
from kd_plugin.vocab import Vocabulary

_ROW = ("teacher_id", "domain", "teacher_weights")
_VALIDATION = -1  # in the place of a step: what is written at validation is the same at each
_WAY_OUT = "Let the collator keep 'prompt' as a list, text or messages, with 'teacher_id' beside it for a routed panel."


class TeacherPanelCorrection(StudentCallback):
    """Lets the student write before a step, has the panel correct it, and lets the module train on the correction.

    The batch holds ``prompt``, a list of texts or conversations, and for a routed panel ``teacher_id`` (or
    ``domain``). The module's ``training_step`` is then given ``input_ids``, ``attention_mask`` and ``labels`` of what
    the student wrote; the loss becomes ``ce_weight`` times the module's own plus the panel's divergence in nats a
    token. Where the loader is :class:`~kd_plugin.lightning.data.KDDataModule`'s, an accumulation window is written and
    judged at once, as in TRL.

    Args:
        teachers: name to path, hub id, loaded model or teacher; or a ``TeacherPanel``. None takes
            ``settings.teacher_models`` or ``settings.panel``.
        student: attribute path of the student, where the module holds several models.
        tokenizer: the student's tokenizer; None reads the one that its ``config`` names.
        ce_weight: weight of the module's own loss.
        seed: of what the student writes.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.
        **fields: of :class:`~kd_plugin.lightning.panel_settings.PanelSettings`, whose names are those of
            ``TeacherPanelConfig``.

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
        self.settings = PanelSettings.of(fields)
        self.panel = panel_from(None, teachers, self.settings)
        divergence = self.panel.divergence or self.settings.resolved_divergence()
        require_defined_panel(self.panel, divergence, self.settings.temperature)
        require_sampling(self.panel, self.settings)
        if ce_weight < 0:
            raise ConfigError(f"ce_weight is {ce_weight}; expected a number of at least 0.")
        # The temperature that the student writes at is the one that the divergence is taken at, as in TRL
        self.objective = PanelObjective(self.panel, divergence, self.settings.temperature, ce_weight)
        super().__init__(student)
        self.seed = seed
        self.lineage = lineage
        self._given_tokenizer = tokenizer
        self._tokenizer: Any = None
        self._ahead: list[Prepared] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the student where it was not there before, load the teachers, and join the student's forward pass."""
        model = find_student(pl_module, self.student)
        if not self._checked:
            self._check(trainer, pl_module, model)
        self._join(trainer, pl_module, model)
        assert self._forward is not None
        report = functools.partial(self._report, pl_module)
        self._step = DistillingStep(trainer, pl_module, self._forward, self._next, report)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the teachers for a validation without training."""
        if self._forward is None:
            model = find_student(pl_module, self.student)
            self._compare_vocabularies(pl_module, model)
            self._join(trainer, pl_module, model)

    def measure(
        self, module: LightningModule, batch: Any, run: Callable[[Any], Tensor | None], batch_idx: int
    ) -> list[str]:
        """Let the student write on prompts, and log what the panel says of it: means over all written tokens.

        It writes as in training, and at each validation from the same random numbers.

        Args:
            module: the module that validates.
            batch: prompts as in training.
            run: called with ``input_ids``, ``attention_mask`` and ``labels``; must run the student over them, and
                returns its loss.
            batch_idx: number of the batch.

        Returns:
            What the student wrote, as text.
        """
        require_mapping(batch, "prompt", _WAY_OUT)
        assert self._forward is not None
        trainer = module.trainer
        seed = mixed_seed(self.seed, _VALIDATION, trainer.global_rank, batch_idx)
        prepared = self._corrected(trainer, module, [batch], seed)[0]
        call = Call(prepared.target, prepared.labels, prepared.shape, joint=True)
        with self._forward.step(call):
            own = run(prepared.batch)
        rollouts, tokens = prepared.target.rollouts, call.found.tokens
        divergence = call.found.own_mean()
        weight = self.objective.ce_weight
        loss = divergence if weight == 0.0 or own is None else divergence + weight * own.detach()
        log = functools.partial(module.log, sync_dist=True, add_dataloader_idx=False)
        log("val/divergence", divergence, batch_size=tokens)
        log("val/loss", loss, batch_size=tokens)
        log("val/completion_length", tokens / len(rollouts.lengths), batch_size=len(rollouts.lengths))
        for name, (own_sum, count) in self._by_teacher(call.found).items():
            log(f"val/divergence/{name}", own_sum / max(count, 1), batch_size=count)
        return texts(rollouts, self._tokenizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the rows, where the loader allows it, so that what is missing shows before any step."""
        loader: Any = trainer.train_dataloader
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if "prompt" in (getattr(dataset, "column_names", None) or ()):
            check_rows(dataset, "the train dataset", self.panel)
        elif collate is not None and dataset is not None and hasattr(dataset, "__getitem__") and len(dataset):
            require_mapping(collate([dataset[0]]), "prompt", _WAY_OUT)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the student write and the panel judge, for this batch or for the whole window that begins with it."""
        require_mapping(batch, "prompt", _WAY_OUT)
        if self._ahead:
            return
        batches = batch.get(WINDOW) or [batch]
        seed = mixed_seed(self.seed, trainer.global_step, trainer.global_rank, batch_idx)
        self._ahead = self._corrected(trainer, pl_module, batches, seed)
        if WINDOW not in batch:
            self._ahead = [_alone(self._ahead[0])]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was, and what was written for it."""
        super().teardown(trainer, pl_module, stage)
        self._ahead = []

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate, and compare vocabularies and placements; none of it needs any weights."""
        require_placeable(self.panel, trainer)
        declared = self.lineage if self.lineage is not None else declared_lineage(trainer)
        run = start_run(
            method="teacher_panel",
            student=student_source(model),
            teachers=[teacher.source for teacher in self.panel.teachers.values()],
            settings={**dict(module.hparams), "panel": self.settings, "ce_weight": self.objective.ce_weight},
            declared=declared,
        )
        lineage_of(trainer, run, module)
        self._compare_vocabularies(module, model)
        self._checked = True

    def _compare_vocabularies(self, module: LightningModule, model: PreTrainedModel | str) -> None:
        self._tokenizer = self._given_tokenizer or getattr(module, "tokenizer", None) or load_tokenizer(model)
        self._vocabulary = Vocabulary.from_tokenizer(self._tokenizer)
        require_one_vocabulary(self.panel, self._vocabulary)

    def _join(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel) -> None:
        """Load the teachers, and patch the student's forward pass."""
        place_teachers(self.panel, trainer, module, model, self._vocabulary)
        self._forward = DistillingForward(model, self._vocabulary.size, self.objective)

    def _corrected(self, trainer: Trainer, module: LightningModule, batches: list[Any], seed: int) -> list[Prepared]:
        """Write and judge some batches at once, and return them one by one."""
        assert self._forward is not None
        prompts = [prompt for batch in batches for prompt in batch["prompt"]]
        rows = [{name: _of_row(batch, name, i) for name in _ROW} for batch in batches for i in range(_rows(batch))]
        assignments = [self.panel.assign(row) for row in rows]
        with trainer.precision_plugin.forward_context():
            rollouts = self.write(module, prompts, seed)
            corrections = score_rows(
                self.panel,
                assignments,
                rollouts.input_ids,
                rollouts.attention_mask,
                completion_start=rollouts.completion_start,
                positions=[range(length) for length in rollouts.lengths],
                rows_at_once=_rows(batches[0]),
            )
        window_tokens = sum(rollouts.lengths)
        prepared, first = [], 0
        for batch in batches:
            own = slice(first, first + _rows(batch))
            first += _rows(batch)
            part = rollouts.select(own)
            labels = part.labels()
            seen = {"input_ids": part.input_ids, "attention_mask": part.attention_mask, "labels": labels}
            target = Corrected(tuple(corrections[own]), part, trainer.global_step)
            tokens = sum(part.lengths)
            prepared.append(Prepared(seen, target, labels, tuple(part.input_ids.shape), tokens, window_tokens))
        return prepared

    def write(self, module: LightningModule, prompts: list[Any], seed: int) -> Rollouts:
        """Let the student answer ``prompts``; what it writes depends on ``seed`` and its weights alone."""
        model = next((m for m in module.modules() if hasattr(m, "peft_config")), None)
        student = find_student(module, self.student) if model is None else model
        ids = render(self._tokenizer, prompts)
        return write(module, student, self._tokenizer, ids, self.settings.sampling(), seed)

    def _next(self, batch: Any) -> Prepared:
        return self._ahead.pop(0)

    def _report(self, module: LightningModule, call: Call, total: Tensor) -> None:
        found, tokens = call.found, max(call.found.tokens, 1)
        values: dict[str, Any] = {"kd/loss": total.detach(), "kd/entropy": found.entropy.sum() / tokens}
        length = sum(call.target.rollouts.lengths) / max(len(call.target.rollouts.lengths), 1)
        values["kd/completion_length"] = float(length)
        for name, (own, count) in self._by_teacher(found).items():
            values[f"tokens/{name}"] = float(count)
            if count:
                values[f"divergence/{name}"] = own / count
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=call.shape[0])

    def _by_teacher(self, found: PanelFound) -> dict[str, tuple[Tensor, int]]:
        """Return each teacher's summed divergence, in nats, and the number of positions that it judged."""
        by_name = {name: (found.loss_sum.new_zeros(()), 0) for name in self.panel.names}
        for one in found.judgements:
            total, count = by_name[one.teacher]
            by_name[one.teacher] = total + one.divergence.sum(), count + one.divergence.numel()
        return by_name


def _alone(prepared: Prepared) -> Prepared:
    """Return a batch whose window is not known: it is divided by its own tokens."""
    one = prepared
    return Prepared(one.batch, one.target, one.labels, one.shape, one.tokens)


def _rows(batch: Any) -> int:
    return len(batch["prompt"])


def _of_row(batch: Any, name: str, row: int) -> Any:
    return batch[name][row] if name in batch and batch[name] is not None else None
