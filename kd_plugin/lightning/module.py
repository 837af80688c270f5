"""Ready modules for projects that are driven by configuration files: a student alone, with a cache, or with a panel."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from transformers import AutoTokenizer, get_scheduler

from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.lightning.callbacks import TaskEvaluation
from kd_plugin.lightning.offline import OfflineKD, TeacherText
from kd_plugin.lightning.panel import TeacherPanelCorrection
from kd_plugin.lightning.step import SAMPLES
from kd_plugin.lightning.student import engine_of
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.models import load_language_model
from kd_plugin.panel.settings import PanelSettings
from kd_plugin.rollouts.in_process import Sampling
from kd_plugin.rollouts.rows import render
from kd_plugin.settings import option, settings, takes, values_of
from kd_plugin.sharding import shard_with_fsdp2
from kd_plugin.text.dataset import TrainingText
from kd_plugin.verifying import verifier

logger = logging.getLogger(__name__)


@settings
class StudentSettings(EvaluationSettings):
    """The student; how it is loaded, adapted, optimized and sampled from at validation.

    Raises:
        ConfigError: an unknown ``verify``.
    """

    revision: str | None = option(default=None, help="Branch, tag or commit of the student, for a hub id.")
    dtype: str = option(default="float32", help="Of the student's weights.")
    model_init_kwargs: dict[str, Any] | None = option(
        default=None, help="Further arguments of `from_pretrained` for the student."
    )
    use_peft: bool = option(default=False, help="Train a LoRA adapter instead of all weights.")
    lora_r: int = option(default=16, help="Rank of the adapter.")
    lora_alpha: int = option(default=32, help="Scale of the adapter's update, over its rank.")
    lora_dropout: float = option(default=0.0, help="Dropout of the adapter's input.")
    lora_target_modules: list[str] | None = option(
        default=None, help="Names of the layers that get an adapter; none takes PEFT's for the architecture."
    )
    gradient_checkpointing: bool = option(default=False, help="Recompute activations in the backward pass.")
    learning_rate: float = option(default=2e-5, help="Learning rate of AdamW, at its highest.")
    weight_decay: float = option(default=0.0, help="Weight decay of AdamW.")
    lr_scheduler_type: str = option(
        default="linear", help="A name that `transformers.get_scheduler` knows: constant, linear, cosine ..."
    )
    warmup_steps: int = option(default=0, help="Steps until the learning rate is at its highest.")
    sample_length: int = option(default=64, help="Tokens of an answer at validation.")
    samples_shown: int = option(
        default=4, help="Answers that are logged as text at each validation, where the logger takes text."
    )
    verify: str = option(
        default="exact", help="How an answer is compared with the row's `answer`: 'exact', 'contains' or 'math'."
    )

    def __post_init__(self) -> None:
        EvaluationSettings.__post_init__(self)
        verifier(self.verify)


@takes(StudentSettings)
class StudentModule(LightningModule):
    """Loads a causal language model and fine-tunes it; the base of the ready modules.

    The model is built in ``configure_model``, so that strategies can shard it while it loads: transformers loads it in
    pieces under ZeRO-3, and under ``ModelParallelStrategy`` its layers are wrapped for FSDP2. At validation it answers
    the data module's ``samples``; where those have an ``answer``, ``val/accuracy`` is logged.

    Args:
        model: a path or hub id.

    Raises:
        ConfigError: an unknown ``verify``.
    """

    def __init__(self, model: str, **fields: Any) -> None:
        student = StudentSettings(**fields)
        fields = vars(student)  # with the defaults, for the hyper-parameters
        super().__init__()
        self.save_hyperparameters()
        self._is_right = verifier(student.verify)
        self.model: Any = None
        self._tokenizer: Any = None
        self._shown: list[list[str]] = []

    @property
    def student_reference(self) -> str:
        """What the student starts from: known before it is loaded, so that the license gate comes first."""
        return self.hparams["model"]

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.hparams["model"], revision=self.hparams["revision"])
        return self._tokenizer

    def configure_model(self) -> None:
        """Load the student, add its adapter, and shard it where the strategy asks for that."""
        if self.model is not None:
            return
        hp = self.hparams
        options = {"dtype": hp["dtype"], "revision": hp["revision"], **(hp["model_init_kwargs"] or {})}
        model: Any = load_language_model(hp["model"], **options)
        if hp["gradient_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if hp["use_peft"]:
            model = self._adapted(model)
            if hp["gradient_checkpointing"]:
                model.enable_input_require_grads()
        self.model = model.train()
        mesh = self.device_mesh
        if mesh is not None:
            shard_with_fsdp2(model, mesh=mesh["data_parallel"])

    def own_set(self) -> list[Callback]:
        """Return what has the student answer ``eval_tasks`` at validation, where there are any."""
        given = values_of(EvaluationSettings, self.hparams)
        return [] if given["eval_tasks"] is None else [TaskEvaluation(**given)]

    def _adapted(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        hp = self.hparams
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=hp["lora_r"],
                lora_alpha=hp["lora_alpha"],
                lora_dropout=hp["lora_dropout"],
                target_modules=hp["lora_target_modules"],
            ),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy; distillation is added by the callback."""
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer the samples and verify the answers."""
        if "prompt" not in batch or "input_ids" in batch:
            return
        sampling = Sampling(max_completion_length=self.hparams["sample_length"], temperature=0.0)
        engine = engine_of(self, self.model, self.tokenizer, sampling, seed=0)
        responses = [one.ids for one in engine.generate(render(self.tokenizer, batch["prompt"]))]
        written = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        self._shown += [[_as_text(p), text] for p, text in zip(batch["prompt"], written, strict=True)]
        self.log_accuracy("val/accuracy", written, batch)

    def log_accuracy(self, name: str, written: list[str], batch: Any) -> None:
        """Log under ``name`` which share of what was written is right, where the batch has an ``answer``."""
        if not batch.get("answer"):
            return
        right = [self._is_right(t, str(a)) for t, a in zip(written, batch["answer"], strict=True)]
        share = sum(right) / len(right)
        self.log(name, share, batch_size=len(right), sync_dist=True, prog_bar=True, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """Log some of the answers as text."""
        shown, self._shown = self._shown[: self.hparams["samples_shown"]], []
        loggers: list[Any] = self.trainer.loggers if shown and self.trainer.is_global_zero else []
        for destination in loggers:
            if hasattr(destination, "log_text"):
                destination.log_text("val/samples", columns=["prompt", "written"], data=shown)
            elif hasattr(destination.experiment, "add_text"):
                text = "\n\n".join(f"**{prompt}**\n\n{written}" for prompt, written in shown)
                destination.experiment.add_text("val/samples", text, self.global_step)
        for prompt, written in shown:
            logger.info("validation sample: %r -> %r", prompt, written)

    def configure_optimizers(self) -> Any:
        """Return AdamW over what is trained, with its schedule."""
        hp = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            if hp["lr_scheduler_type"] != "constant":
                raise ConfigError(
                    "The number of steps is unknown, so the learning rate cannot follow a schedule over them. Set "
                    "trainer.max_steps or trainer.max_epochs, or lr_scheduler_type: constant."
                )
            steps = 0
        scheduler = get_scheduler(hp["lr_scheduler_type"], optimizer, hp["warmup_steps"], int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt)


@settings
class OfflineCallbackSettings(LineageSettings, OfflineSettings):
    """All that :class:`OfflineKD` takes from a configuration file, beside the cache."""


@settings
class OfflineModuleSettings(StudentSettings, OfflineCallbackSettings):
    """All that :class:`OfflineKDModule` takes."""

    def __post_init__(self) -> None:
        OfflineSettings.__post_init__(self)
        StudentSettings.__post_init__(self)


@takes(OfflineModuleSettings)
class OfflineKDModule(StudentModule):
    """A student that is fitted to a teacher cache: :class:`StudentModule` with the callback :class:`OfflineKD`.

    Args:
        model: the student, a path or hub id.
        cache: directory of the teacher cache, or a mapping from directories to weights: an offline panel. None takes
            the data module's; where that has a text instead, the student is trained on it by cross-entropy.
    """

    def __init__(self, model: str, cache: dict[str, float] | str | None = None, **fields: Any) -> None:
        settings = OfflineModuleSettings(**fields)
        fields = vars(settings)
        super().__init__(model, **values_of(StudentSettings, fields))
        self.save_hyperparameters()
        self._kd: OfflineKD | None = None

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that adds the divergence; Lightning attaches it."""
        hp = self.hparams
        try:
            data = getattr(getattr(self.trainer, "datamodule", None), "hparams", {})
        except RuntimeError:  # it is asked outside a trainer
            data = {}
        cache = hp["cache"] or data.get("cache")
        if data.get("text") is not None:
            text = TrainingText.open(data["text"], OfflineSettings(**values_of(OfflineSettings, hp)), cache)
            return [TeacherText(text, lineage=hp["lineage"]), *self.own_set()]
        if cache is None:
            raise ConfigError("No teacher cache is given: set model.cache or data.cache; or data.text.")
        self._kd = OfflineKD(cache, **values_of(OfflineCallbackSettings, hp))
        return [self._kd, *self.own_set()]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the divergence, or the cross-entropy of a text, on held-out rows, and answer the samples."""
        if "input_ids" in batch and self._kd is not None:
            self._kd.measure(self, batch, lambda seen: self.model(**seen))
        elif "input_ids" in batch:
            tokens = max(int((batch["labels"][:, 1:] != -100).sum()), 1)
            loss = self.model(**batch).loss
            self.log("val/loss", loss, batch_size=tokens, sync_dist=True, add_dataloader_idx=False)
        super().validation_step(batch, batch_idx, dataloader_idx)


@settings
class CallbackSettings(LineageSettings, PanelSettings):
    """All that :class:`TeacherPanelCorrection` takes from a configuration file."""

    ce_weight: float = option(default=0.0, help="Weight of the cross-entropy on the responses.")
    seed: int = option(default=0, help="Seed of the responses.")


@settings
class PanelModuleSettings(StudentSettings, CallbackSettings):
    """All that :class:`TeacherPanelModule` takes."""

    def __post_init__(self) -> None:
        CallbackSettings.__post_init__(self)
        StudentSettings.__post_init__(self)


@takes(PanelModuleSettings)
class TeacherPanelModule(StudentModule):
    """A student that a panel scores: :class:`StudentModule` with the callback :class:`TeacherPanelCorrection`.

    Args:
        model: the student, a path or hub id.
        teacher_models: name to path or hub id of each teacher.
    """

    def __init__(self, model: str, teacher_models: dict[str, Any] | str | None = None, **fields: Any) -> None:
        settings = PanelModuleSettings(teacher_models=teacher_models, **fields)
        fields = vars(settings)
        super().__init__(model, **values_of(StudentSettings, fields))
        self.save_hyperparameters()
        # Built now, so that a wrong setting shows before a model or the trainer is
        self._correction = TeacherPanelCorrection(**values_of(CallbackSettings, fields))

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that has the panel score the responses; Lightning attaches it."""
        return [self._correction, *self.own_set()]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Let the student generate on held-out prompts and the panel score them; answer the samples."""
        if "prompt" not in batch or SAMPLES in batch:
            super().validation_step(batch, batch_idx, dataloader_idx)
            return
        responses = self._correction.measure(self, batch, lambda seen: self.model(**seen).loss, batch_idx)
        self.log_accuracy("val/rollout_accuracy", responses, batch)
