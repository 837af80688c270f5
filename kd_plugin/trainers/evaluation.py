"""Every evaluation of a transformers trainer: the user's own set, and means over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from kd_plugin.evaluation.cost import Cost, CostMeter
from kd_plugin.evaluation.in_loop import (
    EvaluationSettings,
    Learner,
    Ranks,
    TasksInLoop,
    metrics_of,
    recorded,
    unnoticed,
)
from kd_plugin.lineage.trainer_callback import lineage_callback
from kd_plugin.monitor.metrics import TokenMeans
from kd_plugin.student.head import load_tokenizer

logger = logging.get_logger(__name__)


class TaskEvaluationMixin(Trainer):
    """Has the student answer :attr:`own_tasks` whenever the trainer evaluates, with or without an ``eval_dataset``.

    Each task's ``eval_NAME_accuracy`` and ``eval_NAME_accuracy_error`` are among the metrics of the evaluation, so that
    ``metric_for_best_model`` and ``EarlyStoppingCallback`` can go by them; beside them is what the training has cost
    until then. What was measured is in the lineage of the checkpoint of that step. Training stays as it is without, bit
    for bit.

    The mixins that distil bring it along. Before any other transformers trainer it evaluates that one's student::

        class MyEvaluatedTrainer(TaskEvaluationMixin, MyTrainer): ...

        trainer = MyEvaluatedTrainer(model=model, args=args, evaluation=EvaluationSettings(eval_tasks="tasks.yaml"))

    Args:
        *positional: of your trainer.
        evaluation: the questions; left out, there are none, or those that a subclass has set.
        **kwargs: of your trainer.

    Raises:
        ConfigError: a task is wrong.
        DataError: its questions cannot be read.
    """

    own_tasks: TasksInLoop | None = None
    _prefix: str | None = None  # of the evaluation that is under way and is to have the tasks

    def __init__(self, *positional: Any, evaluation: EvaluationSettings | None = None, **kwargs: Any) -> None:
        if evaluation is not None:
            self.own_tasks = TasksInLoop.of(evaluation)
        self._meter, args = _Metering(self), kwargs.get("args")
        if self.own_tasks is None or args is None or kwargs.get("eval_dataset") is not None:
            super().__init__(*positional, **kwargs)
            self._count()
            return
        # transformers 5.23 refuses a strategy without a dataset, and looks no more at it after that
        strategy, args.eval_strategy = args.eval_strategy, "no"
        try:
            super().__init__(*positional, **kwargs)
        finally:
            args.eval_strategy = strategy
        self.args.eval_strategy = strategy
        self._count()

    @property
    def counted_teachers(self) -> Mapping[str, Any]:
        """Models of the teachers in this process, by name, whose passes are a part of the cost."""
        return {}

    @property
    def spent(self) -> float:
        """What servers were paid so far."""
        return 0.0

    def _count(self) -> None:
        if self.own_tasks is not None:
            self.add_callback(self._meter)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as the parent does, and have the tasks answered; a dataset that is given is evaluated alone."""
        if self.own_tasks is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        own: Any = self.eval_dataset
        if own is not None and not isinstance(own, dict):
            self._prefix = metric_key_prefix
            try:
                return super().evaluate(None, ignore_keys, metric_key_prefix)
            finally:
                self._prefix = None
        found = super().evaluate(None, ignore_keys, metric_key_prefix) if own else {}
        with unnoticed(self.model):  # logged as an evaluation
            measured = self._measure(metric_key_prefix)
            self.log(measured)
        metrics = {**found, **measured}
        trainer: Any = self
        trainer.control = self.callback_handler.on_evaluate(self.args, self.state, trainer.control, metrics)
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate a dataset as the parent does; the one of an evaluation comes with the tasks."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._prefix is not None:
            output.metrics.update(self._measure(self._prefix))
        return output

    def _measure(self, prefix: str) -> dict[str, float]:
        assert self.own_tasks is not None
        with self._meter.paused():
            return self._measured(self.own_tasks, prefix)

    def _measured(self, tasks: TasksInLoop, prefix: str) -> dict[str, float]:
        accelerator = self.accelerator
        tokenizer: Any = self.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        student = accelerator.unwrap_model(self.model_wrapped)
        world = accelerator.num_processes
        learner = Learner(
            student,
            load_tokenizer(student) if tokenizer is None else tokenizer,
            accelerator.device,
            sharded=world > 1 and (is_deepspeed_zero3_enabled() or self.is_fsdp_enabled),
        )
        found = tasks.measure(
            learner,
            Ranks(accelerator.process_index, world, gather_object if world > 1 else list),
            cost=self._meter.read(),
            output_dir=str(self.args.output_dir),
            step=self.state.global_step,
        )
        callback = lineage_callback(self.callback_handler.callbacks)
        if callback is not None and callback.run is not None:
            callback.run.note_evaluation(self.state.global_step, recorded(found))
        return metrics_of(found, prefix + "_{task}_{value}")


class _Metering(TrainerCallback):
    """Counts what a training costs, from its start; of a resumed one, from what its last evaluation had logged."""

    def __init__(self, trainer: TaskEvaluationMixin) -> None:
        self._trainer, self._meter, self._before = trainer, CostMeter(), Cost()
        self.paused = self._meter.paused

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin."""
        logged = [entry for entry in state.log_history if "eval_cost_seconds" in entry]
        if logged and state.global_step:
            self._before = Cost(**{name: logged[-1][f"eval_cost_{name}"] for name in vars(self._before)})
        self._meter.attach(self._trainer.accelerator.unwrap_model(kwargs["model"]), self._trainer.counted_teachers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End; what was counted stays."""
        self._meter.detach()

    def read(self) -> Cost:
        """Return what this process has taken, and what was paid."""
        return self._before + self._meter.read() + Cost(money=self._trainer.spent)


class TokenMeanMixin:
    """Makes of a trainer's ``eval_loss`` the mean over all scored tokens, as the loss of one batch would be.

    transformers (5.23) takes the mean of the batches' means, in which the tokens of small batches count for more, and
    a batch without any counts as a loss of 0. While :attr:`evaluated` is set the trainer adds to it what each batch
    sums: the parts of the loss under names that begin with ``loss``, which are added up, and metrics under their names.
    """

    accelerator: Any
    evaluated: TokenMeans | None = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as the parent does, and give means over tokens."""
        self.evaluated = TokenMeans()
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self.evaluated.read(gather_object)
        finally:
            self.evaluated = None
        losses = {name: mean for name, mean in means.items() if name.startswith("loss")}
        if losses:
            defined = [mean for mean in losses.values() if mean is not None]
            output.metrics[f"{metric_key_prefix}_loss"] = sum(defined) if defined else float("nan")
            if not defined:
                logger.warning(f"{description}: no token was scored, so {metric_key_prefix}_loss is NaN.")
        own = {name: 0.0 if mean is None else mean for name, mean in means.items() if name not in losses}
        self.report_evaluated(own, output.metrics, metric_key_prefix)
        return output

    def report_evaluated(self, means: dict[str, float], metrics: dict[str, float], prefix: str) -> None:
        """Put the means beside the loss into what is logged."""
        metrics.update({f"{prefix}_{name}": mean for name, mean in means.items()})

    def rows_of_its_own(self, rows: int) -> int:
        """Return how many of the ``rows`` of this rank's present batch, from the first on, are not repeats.

        accelerate fills the last batch of all ranks with the first rows again. It cannot tell of a streamed dataset how
        many they are, and neither can this.
        """
        state = self.accelerator.gradient_state
        if not state.in_dataloader or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
