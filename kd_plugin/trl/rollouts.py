"""Whose text the panel corrects in a TRL trainer: hooks into how ``DistillationTrainer`` makes a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from kd_plugin.cache import TeacherCache
from kd_plugin.errors import ConfigError
from kd_plugin.panel import Assignment, TeacherPanel
from kd_plugin.panel.interleaving import InterleavedSettings, interleaved_responses
from kd_plugin.panel.sampling import (
    completed,
    draw_settings,
    own_generation_config,
    require_same_student,
    require_whole_distribution,
)
from kd_plugin.panel.warmup import CacheWarmup, WarmupBatch, warmup_loss, warmup_objective
from kd_plugin.rollouts.decoding import decode_with, generates_row_by_row, real_tokens
from kd_plugin.rollouts.responses import completion_ids, require_prompts
from kd_plugin.rollouts.rows import by_length, on_policy_rows
from kd_plugin.sharding.gathering import most_of_any_rank
from kd_plugin.signals import OutputHead
from kd_plugin.trl.generating import generating
from kd_plugin.trl.vllm_generation import ranks_together
from kd_plugin.trl.zero_generation import ShardedGenerationMixin


class RolloutMixin(ShardedGenerationMixin):
    """Adds to ``DistillationTrainer`` mixed and interleaved rollouts, and a warm-up from teacher caches.

    The trainer sets ``panel``, and calls :meth:`start_rollouts` after its parent's ``__init__`` and
    :meth:`begin_rollouts` before it lets the parent generate.
    """

    panel: TeacherPanel
    args: Any
    accelerator: Any
    state: Any
    model: Any
    _buffered_inputs: list[dict[str, Any]] | None

    def start_rollouts(self, caches: Sequence[TeacherCache]) -> None:
        """Read the configuration; ``caches`` are those of the warm-up."""
        args = self.args
        self._fraction = args.on_policy_schedule()
        self._rollout_judges: list[Assignment] = []
        self._given: list[list[int] | None] = []
        self._empty: list[int] = []  # rows of the generation batch whose response has no token
        self._warmup: CacheWarmup | None = None
        if caches:
            cut = [cache.within(self._vocabulary.size) for cache in caches]  # type: ignore[attr-defined]
            self._warmup = CacheWarmup(cut, seed=args.seed, pad_token_id=self._tokenizer.pad_token_id)  # type: ignore[attr-defined]
            self._warmup_objective = warmup_objective(caches, args.warmup_divergence)
        if args.rollouts == "interleaved" and getattr(self, "tools", None):
            raise ConfigError("rollouts='interleaved' cannot call tools; let the student write alone.")
        if self._fraction.values() != (1.0, 1.0) and getattr(self, "tools", None):
            raise ConfigError("on_policy_fraction below 1 cannot be mixed with tools; let the student write all rows.")
        require_draws(self.panel, args, self.model, self.generation_config)  # type: ignore[attr-defined]
        require_same_student(self.panel, self.model)

    @property
    def is_warming_up(self) -> bool:
        """Whether the present optimizer step fits the warm-up's cache."""
        return (
            self._warmup is not None and self.model.training and self.state.global_step < self.args.warmup_cache_steps
        )

    def begin_rollouts(self, rows: Sequence[dict[str, Any]], judges: Sequence[Assignment]) -> None:
        """Say which rows the next generation is for, and decide which of them the dataset fills."""
        self._rollout_judges = list(judges)
        self._given = [None] * len(rows)
        self._empty = []
        if not self.model.training:
            return
        fraction = self._fraction.at(self.state.global_step)
        if fraction < 1.0:
            step, rank = self.state.global_step, self.accelerator.process_index
            written = on_policy_rows(len(rows), fraction, seed=self.args.seed, step=step, rank=rank)
            self._given = [None if ours else self._completion_ids(row) for ours, row in zip(written, rows, strict=True)]

    def _completion_ids(self, row: dict[str, Any]) -> list[int]:
        return completion_ids(
            self._tokenizer,  # type: ignore[attr-defined]
            row,
            end_tokens=self.eos_token_ids,  # type: ignore[attr-defined]
            max_length=self.args.max_completion_length,
            chat_options={"chat_template": self.chat_template, **self.chat_template_kwargs},  # type: ignore[attr-defined]
        )

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, **kwargs: Any) -> Any:
        require_prompts(prompt_ids)
        given = self._given if len(self._given) == len(prompt_ids) else [None] * len(prompt_ids)
        self._vocabulary.require_rows(prompt_ids, "The prompt of row")  # type: ignore[attr-defined]
        rows = [row for row, ids in enumerate(given) if ids is None]
        texts = self._write(rows, prompt_ids, images, multimodal_fields, **kwargs) or []
        written = dict(zip(rows, texts, strict=True))
        found = [written[row] if ids is None else ids for row, ids in enumerate(given)]
        if len(self._given) == len(prompt_ids):
            self._empty = [row for row, ids in enumerate(found) if not ids]
        # TRL (1.16) looks at the last token of each response, and cannot at that of one without tokens
        return [ids or [self._tokenizer.pad_token_id] for ids in found]  # type: ignore[attr-defined]

    def without_stand_ins(self, output: dict[str, Any]) -> dict[str, Any]:
        """Take the tokens that stood for empty responses out of a generation batch; every rank must call it."""
        output["completion_mask"][self._empty] = 0
        lost = torch.tensor(float(len(self._empty)), device=self.accelerator.device)
        output["num_items_in_batch"] = output["num_items_in_batch"] - self.accelerator.gather(lost).sum()
        return output

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Call tools as the parent does, and take part while other ranks generate: theirs may call more of them."""
        found = super()._tool_call_loop(*args, **kwargs)  # type: ignore[misc]
        while self._generates_together and self._write([], [], None, {}) is not None:
            continue
        return found

    def _write(
        self, rows: list[int], prompt_ids: Any, images: Any, multimodal_fields: Any, **kwargs: Any
    ) -> list[list[int]] | None:
        """Let the student write the completions of some rows; None if no rank that generates with this one has any."""
        device = self.accelerator.device
        most = most_of_any_rank([len(rows)], device)[0] if self._generates_together else len(rows)
        if not most:
            return None
        chosen = [prompt_ids[row] for row in rows]
        if not rows and not self.use_vllm:  # type: ignore[attr-defined]
            # transformers cannot write nothing; what it writes here is not used
            chosen = prompt_ids[:1] or [[self._tokenizer.pad_token_id]]  # type: ignore[attr-defined]
        with self._decoding():
            if self.args.rollouts == "interleaved" and self.model.training:
                found = self._interleaved(rows or [0], chosen)
            else:
                found = super()._generate_single_turn(chosen, images, multimodal_fields, **kwargs)  # type: ignore[misc]
        return self.without_loops(found[: len(rows)])  # type: ignore[attr-defined, no-any-return]

    @property
    def _generates_together(self) -> bool:
        """Whether ranks generate, or take the weights to what generates, by calls that all of them must make."""
        if self.accelerator.num_processes == 1:
            return False
        shared = self.use_vllm and ranks_together(self.vllm_generation)[0] > 1  # type: ignore[attr-defined]
        return shared or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # type: ignore[attr-defined, no-any-return]

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Let transformers write with our loop, and cast weights for autocast once instead of for each token."""
        if self.use_vllm:  # type: ignore[attr-defined]
            yield
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)  # type: ignore[attr-defined]
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # type: ignore[attr-defined]
        together = sharded and self.accelerator.num_processes > 1  # each token waits for the other ranks' shards
        options: dict[str, Any] = dict(real_tokens(model, self._vocabulary))  # type: ignore[attr-defined]
        if not together and generates_row_by_row(self.generation_config):  # type: ignore[attr-defined]
            options["custom_generate"] = decode_with(self.args.rollout_draws)
        with self.accelerator.autocast(), self.gathered_where_they_fit(model), generating(model, **options):
            yield

    def _interleaved(self, rows: Sequence[int], prompts: list[list[int]]) -> list[list[int]]:
        """Write ``prompts`` with the panel at the student's elbow."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,  # type: ignore[attr-defined]
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,  # type: ignore[attr-defined]
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as student,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),  # type: ignore[attr-defined]
        ):
            responses, replaced = interleaved_responses(
                self.panel,
                [self._rollout_judges[row] for row in rows],
                prompts,
                lambda ids, mask, count: student.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=self.generation_config,  # type: ignore[attr-defined]
                    max_new_tokens=count,
                ),
                InterleavedSettings(
                    max_new_tokens=self.args.max_completion_length,
                    block=self.args.interleaved_block,
                    top_k=self.args.interleaved_top_k,
                    end_tokens=self.eos_token_ids,  # type: ignore[attr-defined]
                    pad_token_id=self._tokenizer.pad_token_id,  # type: ignore[attr-defined]
                    rows_at_once=self.args.per_device_train_batch_size,
                ),
                vocabulary=self._vocabulary,  # type: ignore[attr-defined]
                device=self.accelerator.device,
                step=self.state.global_step,
                seed=self.args.seed,
                rank=self.accelerator.process_index,
            )
        self._metrics["train"]["rollouts/replaced"].append(replaced)  # type: ignore[attr-defined]
        return responses

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Deal cached rows during the warm-up, else let the student write; the warm-up passes over its prompts."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        args = self.args
        micro_step = self._step % args.gradient_accumulation_steps  # type: ignore[attr-defined]
        if self.is_warming_up and self._warmup is not None:
            return self._warmup_inputs(self._warmup, micro_step)
        if micro_step == 0 or self._buffered_inputs is None:  # resumed runs have no buffer
            whole = self._generate_and_score_completions(generation_batch)  # type: ignore[attr-defined]
            self._buffered_inputs = micro_batches(whole, args.gradient_accumulation_steps)
        return self._buffered_inputs[micro_step]

    def _warmup_inputs(self, warmup: CacheWarmup, micro_step: int) -> dict[str, Any]:
        args = self.args
        batch = warmup.batch(
            self.state.global_step,
            micro_step,
            args.per_device_train_batch_size,
            micro_steps=args.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        return {"warmup": batch, "num_items_in_batch": torch.tensor(float(batch.scored))}

    def _warmup_loss(
        self, student: nn.Module, batch: WarmupBatch, vocab_size: int, num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the offline loss of cached rows, in the form of ``DistillationTrainer._compute_loss``."""
        device = self.accelerator.device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        hidden = self._get_last_hidden_state(student, ids, mask, ids.size(1) - 1)  # type: ignore[attr-defined]
        hidden = nn.functional.pad(hidden, (0, 0, 0, 1))  # the last position is never scored
        head = OutputHead.from_model(student, vocab_size)
        loss_sum, entropy, scored = warmup_loss(self._warmup_objective, hidden, head, batch.targets)
        count = torch.tensor(scored).to(device)
        return loss_sum / torch.as_tensor(num_items_in_batch).to(device), entropy, count


def require_draws(
    panel: TeacherPanel, args: Any, model: PreTrainedModel | str, config: GenerationConfig | None = None
) -> None:
    """Refuse a student whose own generation configuration biases the sampled estimator.

    Args:
        panel: the teachers, and how they are estimated.
        args: the trainer's settings.
        model: the student, or where it is.
        config: of the trainer, once there is one; TRL 1.16 adds to it what a processor needs.

    Raises:
        ConfigError: tokens would not be drawn from the student's whole distribution.
    """
    if args.use_vllm:
        return  # it is told every setting, and takes nothing from the checkpoint
    given = {"do_sample": True, "cache_implementation": args.cache_implementation, **draw_settings(args)}
    own = own_generation_config(model, (args.model_init_kwargs or {}).get("revision"))
    whole = completed(GenerationConfig(**given) if config is None else config, own)
    require_whole_distribution(panel, whole, args.temperature, given)


def micro_batches(generation_batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Split a generation batch into ``count`` micro-batches, rows of like length together and the longest first.

    The sum over the micro-batches is the same whatever rows they have, and each computes on its own longest row only.
    Between rows of one length the order is random, drawn as ``DistillationTrainer`` draws its shuffle.

    Args:
        generation_batch: tensors and lists with a row in each place, and values that belong to all rows; its
            ``corrections`` know where the rows have their tokens.
        count: divides the number of rows.
    """
    lengths = [correction.span.length for correction in generation_batch["corrections"]]
    order = by_length(lengths, torch.randperm(len(lengths)).tolist())
    index = torch.tensor(order)

    def ordered(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.ndim == 0 else value[index]
        return value if value is None else [value[row] for row in order]

    return split_tensor_dict({name: ordered(value) for name, value in generation_batch.items()}, count)
