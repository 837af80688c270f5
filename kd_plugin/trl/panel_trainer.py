"""On-policy distillation from a panel of teachers: its configuration and trainer, in the place of TRL's own.

Both need what TRL has from 1.15 on (``DistillationConfig``), and are imported where it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.models import prepare_deepspeed

from kd_plugin.divergence.projection import require_finite
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.limits import refuse_images
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.lineage.trainer_callback import declared_lineage, with_lineage
from kd_plugin.monitor.run import PanelRun
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.batches import Assigned, ScoredRollouts
from kd_plugin.panel.sampling import sampled_teacher
from kd_plugin.panel.settings import PanelSettings, RolloutSettings, TeacherSettings, WatchSettings
from kd_plugin.rollouts import Drawn, RolloutEngine
from kd_plugin.rollouts.rows import Rollouts, as_responses, behaviour_logprobs, mixed_seed
from kd_plugin.settings import mappings, mutable, part_of
from kd_plugin.teachers import Teacher
from kd_plugin.trainers.panel import PanelHostMixin
from kd_plugin.trl.config import config_of, without_bf16
from kd_plugin.trl.generation import TRLEngine, ask_for_logprobs, padded_logprobs, recorded, require_draws, share_evenly
from kd_plugin.trl.upstream import EpochSampler, TrlMetricsMixin

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass
class TeacherPanelConfig(
    mutable(WatchSettings),  # type: ignore[misc]
    mutable(RolloutSettings),  # type: ignore[misc]
    mutable(TeacherSettings),  # type: ignore[misc]
    mutable(EvaluationSettings),  # type: ignore[misc]
    mutable(LineageSettings),  # type: ignore[misc]
    DistillationConfig,
):
    """What TRL's ``DistillationConfig`` holds, and how a panel of teachers is combined.

    Every inherited field keeps its meaning. With one teacher and default settings the losses and gradients are
    those of ``DistillationTrainer``.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        *mappings(WatchSettings, RolloutSettings, TeacherSettings, EvaluationSettings, LineageSettings),
    ]

    def __post_init__(self):
        without_bf16(self)
        super().__post_init__()
        self.settings()
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor smooths one-hot labels; the panel has the teachers' distributions in their "
                "place. Set it to 0."
            )
        if self.shard_teachers and self.deepspeed is None and self.deepspeed_plugin is None:
            raise ConfigError(
                "shard_teachers needs DeepSpeed: set `deepspeed` to a configuration file, or launch with an Accelerate "
                "YAML that names one."
            )
        if self.rollout_engine is not None and self.use_vllm:
            raise ConfigError("use_vllm is TRL's own vLLM generation, and rollout_engine another. Set one of the two.")
        if self.rollouts == "interleaved" and self.use_vllm:
            raise ConfigError(
                "rollouts='interleaved' needs transformers generation: the panel replaces tokens as they are sampled. "
                "Set use_vllm=False, or let the student generate alone (rollouts='student')."
            )

    def settings(self) -> PanelSettings:
        """Return what decides an on-policy step, as it is now, for the rooms that know no host.

        Raises:
            ConfigError: an unknown name, a value out of range, or two that contradict each other.
        """
        return part_of(PanelSettings, self)


class TeacherPanelTrainer(TrlMetricsMixin, PanelHostMixin, DistillationTrainer):
    """``DistillationTrainer`` with several teachers, a fused loss, and lineage in every checkpoint.

    The student generates responses; each row is scored by the teachers of the panel that its ``teacher_id`` names;
    the student is trained on the weighted divergence from them. Teachers score once for a generation batch, and only
    their last hidden states at the scored positions are kept until the loss. The step itself is
    :class:`~kd_plugin.panel.step.PanelStep`, and this trainer its host.

    Args:
        model: the student: a path, a hub id, or a loaded (PEFT) model, as in TRL.
        teacher_model: the single teacher, as in TRL; the same as ``teacher_models={"teacher": ...}``.
        args: the configuration; a plain ``DistillationConfig`` is not enough for a panel of several.
        train_dataset: rows with ``prompt``, and ``teacher_id`` (or ``domain`` and ``args.routes``) where the
            panel has several teachers.
        eval_dataset: likewise; or several, by name.
        processing_class: the tokenizer, as in TRL, like all that follow.
        callbacks: callbacks.
        optimizers: an optimizer and a scheduler.
        quantization_config: of a student that is given by path.
        peft_config: of an adapter for the student.
        tools: functions that the student may call.
        teacher_models: name to path, hub id, loaded model or :class:`~kd_plugin.teachers.Teacher`; or a
            :class:`~kd_plugin.panel.TeacherPanel`.

    Raises:
        LicenseRefusedError: the terms of a teacher forbid training; raised before any model is loaded.
        VocabularyError: a teacher's tokens differ from the student's.
        DataError: ``prompt`` is missing, or a row names a teacher that is not on the panel.
    """

    _buffered_inputs: list[dict[str, Any]] | None
    _name = "TeacherPanel"
    _tag_names: ClassVar[list[str]] = ["trl", "kd-plugin", "distillation", "teacher-panel"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        args: TeacherPanelConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        *,
        teacher_models: TeacherPanel | Mapping[str, Any] | None = None,
    ) -> None:
        args = config_of(TeacherPanelConfig, args, model)
        require_no_tools(args, tools)
        run = self.gate_panel(
            args,
            PanelRun(args, teacher_models, teacher_model),
            model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            declared=declared_lineage(callbacks),
            evaluation=part_of(EvaluationSettings, args),
        )
        if tools and self.panel.text_teachers:
            raise ConfigError(
                "A text teacher corrects what the student generated, and with tools a part of a response is a tool's. "
                "Leave tools out, or have teachers that give distributions."
            )
        if tools and args.rollout_engine is not None and (name := sampled_teacher(self.panel)):
            raise ConfigError(
                f"estimator='sampled' (teacher {name!r}) with a rollout_engine and tools: what a tool said was drawn "
                "by nobody and has no importance ratio. Use another estimator, or let the student generate in process."
            )
        require_draws(self.panel, args, model)
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=with_lineage(callbacks, run),
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        if self.use_vllm:
            share_evenly(self.vllm_generation)
            if self._is_sampled:
                ask_for_logprobs(self.vllm_generation, self.temperature)
        require_draws(self.panel, args, self.model, self.generation_config)
        self._assigned = Assigned((), (), 1)
        self._empty: list[int] = []  # rows of the generation batch whose response has no token
        tools_shown = {"tools": self.tools} if self.tools else {}
        self.join_panel(
            self._metrics,
            tokenizer=self._tokenizer,
            end_tokens=self.eos_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            chat_options={"chat_template": self.chat_template, **tools_shown, **self.chat_template_kwargs},
        )
        self._own_engine = TRLEngine(self, self._vocabulary)
        self._drawn: list[Drawn] = []  # the responses of the generation batch, where one turn makes them
        self._draws: tuple[Any, int] = (None, 0)  # generations of the present step

    def replicated_teacher(self, model: nn.Module) -> nn.Module:
        """Return a teacher where each rank has a replica, under ZeRO-1 and 2, in the student's precision."""
        return prepare_deepspeed(model, self.accelerator)

    @property
    def _is_sampled(self) -> bool:
        """Whether a teacher's divergence is estimated from the tokens that the student drew."""
        return sampled_teacher(self.panel) is not None

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(super()._get_train_sampler(dataset))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the batches of an optimizer step; their first one is a generation batch."""
        fetch, counts = super().get_batch_samples, []

        def fetched() -> Any:
            batches, count = fetch(epoch_iterator, num_batches, device)
            counts.append(count)
            return batches

        batches = self.next_window(epoch_iterator, fetched, lambda window: window[0])
        return batches, counts[0] if counts else None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return a micro-batch: cached rows during the warm-up, which passes over prompts, else the student's."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        args, step = self.args, self.panel_step
        rows, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
        micro_step = self._step % parts
        if step.is_warming_up:
            batch = step.warm_up(micro_step, rows, micro_steps=parts)
            return {"batch": batch, "num_items_in_batch": torch.tensor(float(batch.scored))}
        if micro_step == 0 or self._buffered_inputs is None:  # resumed runs have no buffer
            whole = self._generate_and_score_completions(generation_batch)
            scored: ScoredRollouts = whole["scored"]
            # Between rows of one length the order is random, drawn as TRL draws its shuffle
            order = scored.longest_first(torch.randperm(len(scored.scores)).tolist())
            sizes = [len(order) // parts] * parts
            items = whole["num_items_in_batch"]
            self._buffered_inputs = [
                {"batch": batch, "num_items_in_batch": items} for batch in scored.micro_batches(sizes, order)
            ]
        return self._buffered_inputs[micro_step]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        for row in inputs:
            refuse_images((name for name, value in row.items() if value), "A row")  # of a stream, or inside its prompt
        args, step, training = self.args, self.panel_step, self.model.training
        at_once = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        self._assigned, self._empty = step.assign(inputs, at_once), []
        behaviour = None
        if self.use_vllm and self._is_sampled:
            with recorded(self.vllm_generation) as found:
                output = super()._generate_and_score_completions(inputs)
        else:
            output = super()._generate_and_score_completions(inputs)
        completion_mask = output["completion_mask"]
        completion_mask[self._empty] = 0  # what stood in for empty responses
        if self.server_engine is not None and self._is_sampled:
            width = output["completion_ids"].shape[1]
            behaviour = behaviour_logprobs(self._drawn, width, output["completion_ids"].device)
        if self.use_vllm and self._is_sampled:
            behaviour = padded_logprobs(found, completion_mask, cut=args.repetition_stop > 0)
        loss_mask = completion_mask * output["tool_mask"] if "tool_mask" in output else completion_mask
        ids, lengths = output["completion_ids"].tolist(), completion_mask.sum(1).tolist()
        responses = as_responses([row[:length] for row, length in zip(ids, lengths, strict=True)], self.eos_token_ids)
        rollouts = Rollouts(
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], completion_mask], dim=1),
            output["prompt_ids"].size(1),
            tuple(responses),
        )
        scored = output["scored"] = step.score(
            self._assigned,
            rollouts,
            used=loss_mask.tolist(),
            counted=None if training else self.rows_of_its_own(len(inputs)),
            behaviour_logprobs=behaviour,
        )
        local = torch.tensor(float(scored.tokens), device=self.accelerator.device)
        output["num_items_in_batch"] = step.host.sum_over_ranks(local)
        if not training:
            (output["batch"],) = scored.micro_batches([len(inputs)])
        return output

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, **kwargs: Any) -> Any:
        generate = super()._generate_single_turn
        self._own_engine.turn = lambda prompts: generate(prompts, images, multimodal_fields, **kwargs)
        found = self.panel_step.respond(self._assigned, prompt_ids, self._next_engine())
        if len(self._assigned.given) == len(prompt_ids):
            self._drawn = found
            self._empty = [row for row, one in enumerate(found) if not one.ids]
        # TRL (1.16) looks at the last token of each response, and cannot at that of one without tokens
        return [one.ids or [self._tokenizer.pad_token_id] for one in found]

    def _next_engine(self) -> RolloutEngine:
        """Return who generates the next turn, with the seed of it."""
        if self.server_engine is None:
            return self._own_engine
        host, (key, draws) = self.panel_step.host, self._draws
        present = (host.step, host.training)
        self._draws = (present, draws + 1 if present == key else 0)
        # What is generated at each evaluation is the same
        seed = mixed_seed(self.args.seed, host.step if host.training else -1, host.rank, self._draws[1])
        return self.server_engine.seeded(seed, self._own_engine)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Call tools as the parent does, and take part while other ranks generate: theirs may call more of them."""
        found = super()._tool_call_loop(*args, **kwargs)
        engine = self._own_engine if self.server_engine is None else self.server_engine
        while engine.together and self.panel_step.accompany(engine):
            continue
        return found

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the panel's divergence, a sum over scored tokens divided by their number in the global batch."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        require_finite(result[0] if return_outputs else result, "the teacher panel's loss")
        return result

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss_sum, entropy, count = self.panel_loss(unwrapped_student, inputs["batch"])
        normalizer = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return loss_sum / torch.as_tensor(normalizer).to(loss_sum.device), entropy, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does, with each teacher's mean divergence (nats per token) and tokens over all ranks."""
        self.note_panel(logs)
        super().log(logs, start_time)


def require_no_tools(args: TeacherPanelConfig, tools: Any) -> None:
    """Refuse tools where the student does not generate all by itself.

    Raises:
        ConfigError: says which setting is in the way.
    """
    if tools and args.rollouts == "interleaved":
        raise ConfigError("rollouts='interleaved' cannot call tools; let the student generate alone.")
    if tools and args.on_policy_schedule().values() != (1.0, 1.0):
        raise ConfigError("on_policy_fraction below 1 cannot be mixed with tools; let the student generate all rows.")
