"""License lineage beside every checkpoint that a transformers trainer writes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from kd_plugin.errors import KDError
from kd_plugin.lineage import RunLineage, Source
from kd_plugin.trl.start import refuse_another_run

logger = logging.get_logger(__name__)


class LicenseLineageCallback(TrainerCallback):
    """Refuses what the licenses forbid, and writes the lineage wherever the trainer writes weights.

    It is on by default in this package's trainers, and goes on any other transformers trainer::

        trainer = SFTTrainer(..., callbacks=[LicenseLineageCallback(lineage={"use": {"commercial": True}})])

    ``save_model()`` fires no callback, so the model's ``save_pretrained`` is wrapped: each path by which weights
    leave a trainer goes through it. The marker ``lineage.json`` is removed before weights are written and comes
    back last, so its presence always means that the rest is whole.

    Args:
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides, run.
        method: what the lineage calls this training.
        run: a run that is described already, as the trainers of this package pass it.

    Raises:
        LicenseRefusedError: when the trainer is built, if the terms of the student or of a declared teacher or
            dataset forbid training.
    """

    def __init__(
        self,
        lineage: Mapping[str, Any] | str | Path | None = None,
        *,
        method: str = "fine_tuning",
        run: RunLineage | None = None,
    ) -> None:
        self.lineage = lineage
        self.method = method
        self.run = run
        self._step = 0
        self._publishing = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **kwargs: Any
    ) -> None:
        """Pass the gate, and wrap the model's ``save_pretrained``."""
        if self.run is None:
            reference = getattr(model.config, "_name_or_path", None) or None
            self.run = RunLineage(
                method=self.method, student=Source(name="student", ref=reference), config=self.lineage
            )
            self.run.require_trainable()
        if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
            self._follow_saves(model, is_writer=args.should_save)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the identity of the run that is resumed."""
        self._step = state.global_step
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step > 0 and (checkpoint / "lineage.json").is_file():
            self.resume(checkpoint)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step, for saves that the user asks for."""
        self._step = state.global_step
        self._publishing = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete checkpoints whose weights did not pass through ``save_pretrained``, such as sharded ones."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and not self._run.covers(checkpoint):
            self.write(checkpoint)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop a push that the terms forbid, and put the checkpoint's lineage where the push takes its files."""
        if not state.is_world_process_zero:
            return
        self._publishing = True
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if checkpoint.is_dir():
            self._run.require_publishable(checkpoint)
            self._run.copy_files(checkpoint, args.output_dir)
        else:
            self._run.require_publishable(None)

    def resume(self, checkpoint: str | Path) -> None:
        """Keep the id and the date of the run that wrote ``checkpoint``, and chain to it."""
        self._run.resume(checkpoint)

    def write(self, directory: str | Path) -> None:
        """Write the lineage of the weights in ``directory``.

        A failure leaves the weights and no marker: training goes on, and publishing is refused.

        Raises:
            KDError: the lineage cannot be written, and the weights are about to be published.
            OSError: likewise.
        """
        try:
            self._run.write(directory, step=self._step)
        except (KDError, OSError) as error:
            if self._publishing:
                raise
            logger.error(f"The weights in {directory} are saved, but their lineage is not: {error}")

    @property
    def _run(self) -> RunLineage:
        if self.run is None:
            raise KDError("LicenseLineageCallback has no run yet: give it to a trainer before using it.")
        return self.run

    def _follow_saves(self, model: Any, *, is_writer: bool) -> None:
        """Wrap ``save_pretrained`` of this one model; a deep copy of the model rebinds the method to the copy."""
        if not is_writer or isinstance(getattr(model.save_pretrained, "__func__", None), _Following):
            return
        model.save_pretrained = types.MethodType(_Following(self, type(model).save_pretrained), model)


class _Following:
    """A ``save_pretrained`` that takes the marker away before the weights and brings it back after."""

    def __init__(self, callback: LicenseLineageCallback, original: Callable[..., Any]) -> None:
        self.callback = callback
        self.original = original
        functools.update_wrapper(self, original)

    def __call__(self, model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        Path(save_directory, "lineage.json").unlink(missing_ok=True)
        result = self.original(model, save_directory, *args, **kwargs)
        self.callback.write(save_directory)
        return result


class LineageSavingMixin(Trainer):
    """What this package's trainers add to a trainer's life: a clean start, and resumed runs that stay one run."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does.

        Raises:
            ConfigError: ``output_dir`` holds another run's checkpoints, and this call does not resume.
        """
        callback = lineage_callback(self.callback_handler.callbacks)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if not checkpoint:
            if not getattr(self, "_has_trained", False) and callback is not None:
                refuse_another_run(self.args.output_dir, callback._run)
        elif callback is not None and Path(checkpoint, "lineage.json").is_file():
            callback.resume(checkpoint)
        self._has_trained = True
        return super().train(resume_from_checkpoint, *args, **kwargs)


def with_lineage(callbacks: list[TrainerCallback] | None, run: RunLineage) -> list[TrainerCallback]:
    """Return ``callbacks`` with one lineage callback, bound to ``run``; a user's own is kept."""
    chosen = list(callbacks or [])
    own = lineage_callback(chosen)
    if own is None:
        chosen.append(LicenseLineageCallback(run=run))
    else:
        own.run = run
    return chosen


def declared_lineage(callbacks: list[TrainerCallback] | None) -> Mapping[str, Any] | str | Path | None:
    """Return what a user's own lineage callback among ``callbacks`` declares."""
    own = lineage_callback(callbacks or [])
    return None if own is None else own.lineage


def lineage_callback(callbacks: list[TrainerCallback]) -> LicenseLineageCallback | None:
    """Return the lineage callback among ``callbacks``, if there is one."""
    return next((c for c in callbacks if isinstance(c, LicenseLineageCallback)), None)
