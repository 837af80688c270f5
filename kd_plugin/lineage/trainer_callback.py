"""License lineage beside every checkpoint that a transformers trainer writes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from kd_plugin.errors import KDError
from kd_plugin.lineage.card import update_card
from kd_plugin.lineage.data import dataset_sources
from kd_plugin.lineage.proof import Background, Place, hash_share, is_large
from kd_plugin.lineage.record import RECORD, load_record
from kd_plugin.lineage.run import RunLineage
from kd_plugin.lineage.start import Carried, carried_by, student_source, take_over

logger = logging.get_logger(__name__)


class LicenseLineageCallback(TrainerCallback):
    """Refuses what the licenses forbid, and writes the lineage wherever the trainer writes weights.

    It is on by default in this package's trainers, and goes on any other transformers trainer::

        trainer = SFTTrainer(..., callbacks=[LicenseLineageCallback(lineage={"use": {"commercial": True}})])

    ``save_model()`` fires no callback, so the model's ``save_pretrained`` is wrapped: each path by which weights
    leave a trainer goes through it. The marker ``lineage.json`` is removed before weights are written and comes
    back last, so its presence always means that the rest is whole. A checkpoint of the running training is completed
    when all of it is saved: at once, or, where its weights exceed 1 GiB, in a thread while training goes on.

    No event follows the card that ``push_to_hub()`` writes, nor the shards of ``save_model()`` under ZeRO-3 without
    consolidation. The trainers of this package look after both; on another trainer call :meth:`attach` once.

    Args:
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides, run.
        method: what the lineage calls this training.
        run: a run that is described already, as the trainers of this package pass it.
        background: whether large checkpoints may be hashed while training goes on.

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
        background: bool = True,
    ) -> None:
        self.lineage = lineage
        self.method = method
        self.run = run
        self.background = background
        self._step = 0
        self._training = False
        self._publishing = False
        self._asks_for_rows = False
        self._carried: Carried | None = None
        self._pending: dict[Path, int] = {}
        self._thread = Background()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **kwargs: Any
    ) -> None:
        """Pass the gate, and wrap the model's ``save_pretrained``."""
        if self.run is None:
            self.run = RunLineage(method=self.method, student=student_source(model), config=self.lineage)
            self._asks_for_rows = True
            self.run.require_trainable()
        if carried_by(model) is None:  # else it speaks for itself until this run trains it
            self._follow(model, is_writer=args.should_save)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the model, and the identity of the run that is resumed, once all that it rests on is proven."""
        model, loader = kwargs.get("model"), kwargs.get("train_dataloader")
        if self._asks_for_rows:
            self._run.add_datasets(dataset_sources(getattr(loader, "dataset", None)))
        self._run.settle()
        if model is not None:
            self._carried = take_over(model, self._run)
            self._follow(model, is_writer=args.should_save)
        self._step = state.global_step
        self._training = True
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step > 0 and (checkpoint / RECORD).is_file():
            self.resume(checkpoint)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step, for saves that the user asks for."""
        self._step = state.global_step
        if self._carried is not None:
            self._carried.step = max(self._step, 1)
        self._publishing = False
        if control.should_save:
            self._before_a_save(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do likewise where a save follows an epoch."""
        if control.should_save:
            self._before_a_save(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the lineage of the checkpoint, all of whose weights are there now, however they were written."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not state.is_world_process_zero:
            place = Place.from_environment()
            if place.nodes > 1 and place.leads:
                self._thread.submit(lambda: self._hash_share(checkpoint, place))
            return
        if checkpoint.is_dir() and not (checkpoint / RECORD).is_file():
            self._pending[checkpoint] = state.global_step
        self._complete_pending(may_wait=self.background)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop a push that the terms forbid, and put the checkpoint's lineage where the push takes its files."""
        if not state.is_world_process_zero:
            return
        self._publishing = True
        self._thread.wait()
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if checkpoint.is_dir():
            if self._training and not (checkpoint / RECORD).is_file():  # a push in mid-run comes before on_save
                self._pending[checkpoint] = state.global_step
            self._complete_pending(may_wait=False)
            self._run.require_publishable(checkpoint)
            self._run.copy_files(checkpoint, args.output_dir)
        else:
            self._run.require_publishable(None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for lineage that is being written; from now on the model speaks for itself as it is."""
        self._training = False
        best = getattr(state, "best_global_step", None)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and best:
            self._step = best  # transformers has loaded those weights by now
        if self._carried is not None:
            self._carried.close(kwargs["model"])
        self._thread.wait()
        self._complete_pending(may_wait=False)

    def attach(self, trainer: Trainer) -> None:
        """Follow what fires no event: the card of ``push_to_hub()``, and the shards that ``save_model()`` writes."""
        save_model, create_model_card = trainer.save_model, trainer.create_model_card

        @functools.wraps(save_model)
        def saving(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            save_model(output_dir, *args, **kwargs)
            directory = Path(output_dir or trainer.args.output_dir)
            if trainer.is_world_process_zero() and directory not in self._pending and not self._run.covers(directory):
                self.write(directory)

        @functools.wraps(create_model_card)
        def carding(*args: Any, **kwargs: Any) -> None:
            create_model_card(*args, **kwargs)
            if trainer.is_world_process_zero() and Path(trainer.args.output_dir, RECORD).is_file():
                update_card(Path(trainer.args.output_dir), load_record(trainer.args.output_dir))

        trainer.save_model, trainer.create_model_card = saving, carding

    def resume(self, checkpoint: str | Path) -> None:
        """Keep the id and the date of the run that wrote ``checkpoint``, and chain to it."""
        self._run.resume(checkpoint)

    def write(self, directory: str | Path, step: int | None = None) -> None:
        """Write the lineage of the weights in ``directory``.

        A failure leaves the weights and no marker: training goes on, and publishing is refused.

        Args:
            directory: where the weights are.
            step: optimizer steps done; None is the present.

        Raises:
            KDError: the lineage cannot be written, and the weights are about to be published.
            OSError: likewise.
        """
        try:
            self._run.write(directory, step=self._step if step is None else step)
        except (KDError, OSError) as error:
            if self._publishing:
                raise
            logger.error(f"The weights in {directory} are saved, but their lineage is not: {error}")

    def save_begins(self, directory: Path) -> None:
        """Take the marker away before weights are written."""
        self._thread.wait()
        (directory / RECORD).unlink(missing_ok=True)

    def save_ends(self, directory: Path, *, is_dummy: bool) -> None:
        """Bring the marker back, or leave it to the event after the rest of the checkpoint."""
        if self._training and directory.name == f"checkpoint-{self._step}":
            self._pending[directory] = self._step
        elif not is_dummy:
            self.write(directory)

    def _before_a_save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Let the last one finish, since rotation may delete it, and distrust a record of an earlier attempt."""
        if state.is_world_process_zero:
            self.save_begins(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def _complete_pending(self, *, may_wait: bool) -> None:
        pending, self._pending = self._pending, {}
        for directory, step in pending.items():
            if may_wait and is_large(directory):
                self._thread.submit(functools.partial(self.write, directory, step))
            else:
                self.write(directory, step)

    @staticmethod
    def _hash_share(checkpoint: Path, place: Place) -> None:
        try:
            hash_share(checkpoint, place)
        except OSError as error:  # another disk, or a checkpoint that rotation took: the writer hashes it all
            logger.warning(f"This node's share of {checkpoint} is left to the first node: {error}")

    @property
    def _run(self) -> RunLineage:
        if self.run is None:
            raise KDError("LicenseLineageCallback has no run yet: give it to a trainer before using it.")
        return self.run

    def _follow(self, model: Any, *, is_writer: bool) -> None:
        """Wrap ``save_pretrained`` of this model, and of what ``merge_and_unload()`` returns of a PEFT model."""
        if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
            self._follow_saves(model, is_writer=is_writer)
        if hasattr(model, "peft_config"):
            self._follow_saves(model.get_base_model(), is_writer=is_writer)

    def _follow_saves(self, model: Any, *, is_writer: bool) -> None:
        """Wrap ``save_pretrained`` of this one model; a deep copy of the model rebinds the method to the copy."""
        if not is_writer:
            return
        model.save_pretrained = types.MethodType(_Following(self, type(model).save_pretrained), model)

    def speaks_for(self, model: Any) -> bool:
        """Whether the weights of ``model`` are this run's: no other run, and nothing else, changed them since."""
        carried = carried_by(model)
        return self._training or carried is None or (carried.run is self.run and not carried.is_changed)


class _Following:
    """A ``save_pretrained`` that takes the marker away before the weights and brings it back after."""

    def __init__(self, callback: LicenseLineageCallback, original: Callable[..., Any]) -> None:
        self.callback = callback
        self.original = original
        functools.update_wrapper(self, original)

    def __call__(self, model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        self.callback.save_begins(Path(save_directory))
        result = self.original(model, save_directory, *args, **kwargs)
        if not self.callback.speaks_for(model):
            model.__dict__.pop("save_pretrained", None)  # this run has ended, and the weights are not its own any more
            logger.warning(
                f"The weights in {save_directory} were changed after run {self.callback._run.run_id} had ended, by "
                "something that keeps no lineage, so none is written beside them. Train with LicenseLineageCallback, "
                "or write it with kd_plugin.lineage.RunLineage."
            )
            return result
        # Under ZeRO-3 without consolidation transformers saves an empty state first, and then the shards
        self.callback.save_ends(Path(save_directory), is_dummy=kwargs.get("state_dict") == {})
        return result


def with_lineage(callbacks: list[TrainerCallback] | None, run: RunLineage) -> list[TrainerCallback]:
    """Return ``callbacks`` with one lineage callback, bound to ``run``; a user's own is kept."""
    chosen = list(callbacks or [])
    own = lineage_callback(chosen)
    if own is None:
        chosen.insert(0, LicenseLineageCallback(run=run))  # so that the user's own find the record on_save
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
