"""Offline KD for a LightningModule that is there already: from a teacher cache, or from a teacher's text."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from kd_plugin.cache.joining import TARGET, Untaught
from kd_plugin.cache.joint import Caches, JointCache
from kd_plugin.cache.loading import target_of
from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.lightning.callbacks import declared_lineage, lineage_of
from kd_plugin.lightning.step import (
    WINDOW_TOKENS,
    DistillingStep,
    Prepared,
    ReplacedStep,
    StudentCallback,
    divisor,
    require_mapping,
    require_whole_windows,
    with_loss,
    without,
)
from kd_plugin.lightning.student import loss_of
from kd_plugin.limits import refuse_images
from kd_plugin.lineage.start import start_run, student_source
from kd_plugin.settings import built, takes
from kd_plugin.student.forward import Call, DistillingForward
from kd_plugin.student.head import find_student, load_tokenizer, student_rows
from kd_plugin.text.dataset import TrainingText
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)
_WAY_OUT = (
    "Train on TeacherCache(...).dataset(), or add TeacherCache(...).teacher_index(input_ids) to each row, and let the "
    "collator pad it with -1; of several caches OfflineKD(...).cache has dataset(), and indices(input_ids) for all."
)


@takes(OfflineSettings)
class OfflineKD(StudentCallback):
    """Adds the divergence from a teacher cache to whatever a module trains on; the module is left as it is.

    The module holds a transformers causal language model somewhere, and its ``training_step`` returns a loss. The
    batch carries, beside ``input_ids``, ``teacher_index`` (B, L): for each token the number of its target in the
    cache, -1 for none; of several caches the further ones have ``teacher_index_1`` and so on, as ``cache.columns``
    says. The loss becomes ``ce_weight`` times the module's own plus ``kd_weight`` times the divergence,
    in nats a scored token.

    Args:
        cache: the teacher cache or its directory; or an offline panel: a list of them, or a mapping from them to
            weights (see :class:`~kd_plugin.cache.joint.JointCache`).
        student: attribute path of the student, where the module holds several models.
        tokenizer: the student's tokenizer; None reads the one that its ``config`` names.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.

    Raises:
        ConfigError: an unknown name, or numbers or weights of caches out of range. At setup: no student or several, a
            ``training_step`` that leaves no loss to add to, a strategy that is not supported.
        LicenseRefusedError: at setup, the terms of the teacher forbid training.
        VocabularyError: at setup, a cache was captured with another tokenizer.
        DataError: before the first step, batches have no ``teacher_index``; a token has a label and no target.
    """

    loss_name = "the offline KD loss"

    def __init__(
        self,
        cache: Caches,
        *,
        student: str | None = None,
        tokenizer: Any = None,
        lineage: Mapping[str, Any] | str | Path | None = None,
        **fields: Any,
    ) -> None:
        offline = built(OfflineSettings, fields)
        if offline.kd_weight <= 0:
            raise ConfigError(
                f"kd_weight is {offline.kd_weight}; expected a positive number. Without KD, drop the callback."
            )
        self.objective = offline.objective()
        self.cache = JointCache.open(cache, allow_partial=offline.allow_partial)
        self._untaught: Untaught = "keep" if offline.allow_partial else "refuse"
        super().__init__(student)
        self._allow_misaligned = offline.allow_misaligned
        self.tokenizer = tokenizer
        self.lineage = lineage

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what the callback does, for the hash in the lineage."""
        return {"objective": self.objective, "cache": self.cache.digests}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the cache, the trainer, the module and the licenses."""
        if stage == "fit":
            self.cache.require_aligned(allow_misaligned=self._allow_misaligned)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the student where it was not there before, and take part in its forward pass."""
        model = find_student(pl_module, self.student)
        if not self._checked:
            self._check(trainer, pl_module, model)
        self._refuse(pl_module, model)
        self._join(pl_module, model)
        assert self._forward is not None
        report = functools.partial(self._report, pl_module)
        self._step = DistillingStep(trainer, pl_module, self._forward, self._prepare, report)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part in the forward pass of a validation without training."""
        if self._forward is None:
            self._join(pl_module, find_student(pl_module, self.student))

    def measure(self, module: LightningModule, batch: Any, run: Callable[[Any], Any]) -> None:
        """Log the loss and the divergence of a validation batch, means over all scored tokens.

        Args:
            module: the module that validates.
            batch: as in training.
            run: called with what the module sees of the batch; must run the student over it.
        """
        prepared = self._prepare(batch)
        call = Call(prepared.target, prepared.labels, prepared.shape, joint=True)
        assert self._forward is not None
        with self._forward.step(call):
            run(prepared.batch)
        tokens = max(call.found.kd.numel(), 1)
        values = {"val/loss": call.found.loss_sum.detach() / tokens}
        values |= {f"val/{name}": value for name, value in _means(call).items() if name != "entropy"}
        module.log_dict(values, batch_size=tokens, sync_dist=True, add_dataloader_idx=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the first row, where the loader allows it, so that what it lacks shows before any step."""
        require_whole_windows(trainer)
        loader: Any = trainer.train_dataloader
        dataset: Any = getattr(loader, "dataset", None)
        collate = getattr(loader, "collate_fn", None)
        if collate is not None and hasattr(dataset, "__len__") and len(dataset):
            self._prepare(collate([dataset[0]]))

    def _join(self, module: LightningModule, model: PreTrainedModel) -> None:
        """Patch the student's forward pass."""
        if not self._checked:
            self._compare_vocabularies(module, model)
        self._forward = DistillingForward(model, self._vocabulary.size, self.objective, module)

    def _compare_vocabularies(self, module: LightningModule, model: PreTrainedModel | str) -> None:
        tokenizer = self.tokenizer or getattr(module, "tokenizer", None) or load_tokenizer(model)
        own = Vocabulary.from_tokenizer(tokenizer).within(student_rows(model))
        self.cache, self._vocabulary = self.cache.for_student(own, temperature=self.objective.temperature)

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate and compare vocabularies; neither needs the student's weights."""
        declared = self.lineage if self.lineage is not None else declared_lineage(trainer)
        run = start_run(
            method="offline_kd",
            student=student_source(model),
            outputs=self.cache.sources,
            settings={**dict(module.hparams), **self.settings},
            declared=declared,
        )
        lineage_of(trainer, run, self.student)
        self._compare_vocabularies(module, model)
        self._checked = True

    def _require(self, batch: Any) -> None:
        require_mapping(batch, "input_ids", _WAY_OUT)
        refuse_images(batch, "A batch")
        if TARGET not in batch:
            for column in self.cache.columns:
                require_mapping(batch, column, _WAY_OUT)

    def _prepare(self, batch: Any) -> Prepared:
        self._require(batch)
        if self._vocabulary.is_cut:
            self._vocabulary.require_rows(batch["input_ids"].tolist(), "Row")
        labels, gathered = batch.get("labels"), TARGET in batch
        target = target_of(batch, self.cache, self._untaught, self._vocabulary)
        some_have_none = self._untaught == "keep" and labels is not None and not gathered
        return Prepared(
            without(batch, *self.cache.columns, TARGET, WINDOW_TOKENS),
            target,
            labels,
            tuple(batch["input_ids"].shape[:2]),
            tokens=target["positions"].numel(),
            window_tokens=batch.get(WINDOW_TOKENS),
            taught=target["taught"] if some_have_none else None,
        )

    @staticmethod
    def _report(module: LightningModule, call: Call, total: Tensor) -> None:
        values = {"kd/loss": total.detach(), **{f"kd/{name}": value for name, value in _means(call).items()}}
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=call.shape[0])


def _means(call: Call) -> dict[str, Tensor]:
    """Return the parts of a batch's loss, in nats per token, and the student's entropy."""
    found, tokens = call.found, max(call.found.kd.numel(), 1)
    values = {"divergence": found.kd.sum() / max(call.target.get("taught", tokens), 1)}
    values["entropy"] = found.entropy.sum() / tokens
    return values if found.nll is None else {**values, "cross_entropy": found.nll.sum() / tokens}


@dataclass(frozen=True)
class _CrossEntropy:
    ce_weight: float = 1.0


class TeacherText(StudentCallback):
    """Passes the license gate of a teacher's text, and makes a module's mean loss one over all tokens of a step.

    A ``training_step`` returns the mean over its own batch's labels. Ranks and micro-batches hold different numbers of
    them, so each mean is weighed by its share of all labels of the accumulation window, as in TRL.

    Args:
        text: what is trained on.
        student: attribute path of the student, where the module holds several models.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.

    Raises:
        ConfigError: at setup, as ``OfflineKD``.
        LicenseRefusedError: at setup, the terms of a teacher forbid training.
    """

    loss_name = "the loss on the teacher's text"

    def __init__(
        self,
        text: TrainingText,
        *,
        student: str | None = None,
        lineage: Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        super().__init__(student)
        self.text, self.lineage = text, lineage
        self.objective = _CrossEntropy()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the student where it was not there before, and weigh the module's loss from now on."""
        model = find_student(pl_module, self.student)
        if not self._checked:
            self._check(trainer, pl_module, model)
        self._refuse(pl_module, model)
        self._step = _WeighedStep(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse windows that a strategy would fill up from the next epoch."""
        require_whole_windows(trainer)

    def _check(self, trainer: Trainer, module: LightningModule, model: PreTrainedModel | str) -> None:
        """Pass the license gate; no weights are needed."""
        hparams = dict(module.hparams)
        declared = self.lineage if self.lineage is not None else declared_lineage(trainer)
        run = start_run(
            method="offline_kd",
            student=student_source(model, hparams.get("revision")),
            outputs=[self.text.source],
            settings=hparams,
            declared=declared,
        )
        lineage_of(trainer, run, self.student)
        self._checked = True


class _WeighedStep(ReplacedStep):
    """Weighs the module's own loss until :meth:`remove`."""

    def __call__(self, batch: Any, *rest: Any) -> Any:
        """Return the module's output, its loss weighed by the batch's share of the window's tokens."""
        require_mapping(batch, "labels", "Its loss is a mean over them.")
        tokens = (batch["labels"][..., 1:] != -100).sum()
        total = divisor(self.trainer, self.module, tokens, batch.get(WINDOW_TOKENS))
        output = self._inner(without(batch, WINDOW_TOKENS), *rest)
        return with_loss(output, loss_of(output, self.module) * (tokens / total))
