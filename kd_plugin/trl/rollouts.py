"""Whose text the panel corrects in a TRL trainer: hooks into how ``DistillationTrainer`` makes a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.models import unwrap_model_for_generation

from kd_plugin.cache import TeacherCache
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.objective import OfflineObjective
from kd_plugin.errors import ConfigError, DataError
from kd_plugin.panel import Assignment, TeacherPanel
from kd_plugin.panel.judging import panel_logprobs
from kd_plugin.panel.rollouts import interleave, left_padded, on_policy_rows, seeded
from kd_plugin.panel.warmup import CacheWarmup, WarmupBatch
from kd_plugin.signals import OutputHead

_INTERLEAVED = 1 << 20  # keeps its generator apart from that of the on-policy rows


class RolloutMixin:
    """Adds to ``DistillationTrainer`` mixed and interleaved rollouts, and a warm-up from teacher caches.

    The trainer sets ``panel``, and calls :meth:`start_rollouts` after its parent's ``__init__`` and
    :meth:`begin_rollouts` before it lets the parent generate.
    """

    panel: TeacherPanel
    args: Any
    accelerator: Any
    state: Any
    model: Any

    def start_rollouts(self, caches: Sequence[TeacherCache]) -> None:
        """Read the configuration; ``caches`` are those of the warm-up."""
        args = self.args
        self._fraction = args.on_policy_schedule()
        self._rollout_judges: list[Assignment] = []
        self._given: list[list[int] | None] = []
        self._warmup: CacheWarmup | None = None
        if caches:
            self._warmup = CacheWarmup(caches, seed=args.seed, pad_token_id=self._tokenizer.pad_token_id)  # type: ignore[attr-defined]
            self._warmup_objective = OfflineObjective(
                Divergence(args.warmup_divergence), temperature=caches[0].manifest.settings.temperature
            )
        if args.rollouts == "interleaved" and getattr(self, "tools", None):
            raise ConfigError("rollouts='interleaved' cannot call tools; let the student write alone.")
        if self._fraction.values() != (1.0, 1.0) and getattr(self, "tools", None):
            raise ConfigError("on_policy_fraction below 1 cannot be mixed with tools; let the student write all rows.")

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
        if not self.model.training:
            return
        fraction = self._fraction.at(self.state.global_step)
        if fraction < 1.0:
            step, rank = self.state.global_step, self.accelerator.process_index
            written = on_policy_rows(len(rows), fraction, seed=self.args.seed, step=step, rank=rank)
            self._given = [None if ours else self._completion_ids(row) for ours, row in zip(written, rows, strict=True)]

    def _completion_ids(self, row: dict[str, Any]) -> list[int]:
        """Tokenize a dataset's completion as it follows its prompt, up to the first end of sequence."""
        completion, tokenizer = row.get("completion"), self._tokenizer  # type: ignore[attr-defined]
        if not completion:
            raise DataError(
                "on_policy_fraction is below 1, but a row has no `completion` to fill in. Add the column, or let the "
                "student write all rows."
            )
        if isinstance(completion, str):
            ids = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        else:
            options = {"tokenize": True, "return_dict": False, "chat_template": self.chat_template}  # type: ignore[attr-defined]
            options |= self.chat_template_kwargs  # type: ignore[attr-defined]
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template(row["prompt"] + completion, **options)
            if whole[: len(prompt)] != prompt:
                raise DataError(
                    "The chat template renders a prompt otherwise when a completion follows it, so the dataset's "
                    "completions cannot be mixed in. Let the student write all rows (on_policy_fraction=1)."
                )
            ids = whole[len(prompt) :]
        return self._until_end(ids)[: self.args.max_completion_length]

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, **kwargs: Any) -> Any:
        given = self._given if len(self._given) == len(prompt_ids) else [None] * len(prompt_ids)
        rows = [row for row, ids in enumerate(given) if ids is None]
        if not rows and self._fraction.at(self.state.global_step) > 0.0:
            rows = [0]  # generation is a collective call under ZeRO-3; this row's text is not used
        written: dict[int, list[int]] = {}
        if rows:
            chosen = [prompt_ids[row] for row in rows]
            if self.args.rollouts == "interleaved" and self.model.training:
                texts = self._interleaved(rows, chosen)
            else:
                texts = super()._generate_single_turn(chosen, images, multimodal_fields, **kwargs)  # type: ignore[misc]
            written = dict(zip(rows, texts, strict=True))
        return [written[row] if ids is None else ids for row, ids in enumerate(given)]

    def _interleaved(self, rows: Sequence[int], prompts: list[list[int]]) -> list[list[int]]:
        """Write ``prompts`` with the panel at the student's elbow; see :func:`kd_plugin.panel.rollouts.interleave`."""
        if self.use_vllm or self.accelerator.num_processes > 1:  # type: ignore[attr-defined]
            raise ConfigError(
                "rollouts='interleaved' needs transformers generation in a single process: ranks would wait for one "
                "another after different numbers of rounds. Set use_vllm=False, or let the student write alone."
            )
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id  # type: ignore[attr-defined]
        judges = [self._rollout_judges[row] for row in rows]
        with (
            unwrap_model_for_generation(
                self.model_wrapped,  # type: ignore[attr-defined]
                self.accelerator,
                generation_kwargs=self.generation_kwargs,  # type: ignore[attr-defined]
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as student,
            torch.no_grad(),
        ):

            def propose(prefixes: list[list[int]], count: int) -> list[list[int]]:
                ids, mask = left_padded(prefixes, pad)
                output = student.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=self.generation_config,  # type: ignore[attr-defined]
                    max_new_tokens=count,
                )
                return [self._until_end(row) for row in output[:, ids.shape[1] :].tolist()]

            def judge(numbers: Sequence[int], prefixes: list[list[int]], proposals: list[list[int]]) -> list[Tensor]:
                return panel_logprobs(
                    self.panel,
                    [judges[number] for number in numbers],
                    prefixes,
                    proposals,
                    vocab_size=self._vocabulary.size,  # type: ignore[attr-defined]
                    pad_token_id=pad,
                    device=device,
                    rows_at_once=self.args.per_device_train_batch_size,
                    step=self.state.global_step,
                )

            responses = interleave(
                prompts,
                propose,
                judge,
                max_new_tokens=self.args.max_completion_length,
                block=self.args.interleaved_block,
                top_k=self.args.interleaved_top_k,
                end_tokens=self.eos_token_ids,  # type: ignore[attr-defined]
                generator=seeded(self.args.seed, self.state.global_step, _INTERLEAVED),
            )
        replaced = sum(sum(response.replaced) for response in responses)
        tokens = sum(len(response.tokens) for response in responses)
        self._metrics["train"]["rollouts/replaced"].append(replaced / max(tokens, 1))  # type: ignore[attr-defined]
        return [list(response.tokens) for response in responses]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if token in self.eos_token_ids]  # type: ignore[attr-defined]
        return tokens[: ends[0] + 1] if ends else tokens

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Deal cached rows during the warm-up, else let the student write; the warm-up passes over its prompts."""
        if not self.is_warming_up or self._warmup is None:
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        args = self.args
        batch = self._warmup.batch(
            self.state.global_step,
            self._step % args.gradient_accumulation_steps,  # type: ignore[attr-defined]
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
        losses = [self._warmup_objective.loss(hidden, head, target) for target in batch.targets]
        loss_sum = hidden.sum() * 0.0 + sum(loss.loss_sum for loss in losses)
        entropy = loss_sum.new_zeros(()) + sum(loss.entropy.sum() for loss in losses)
        count = torch.tensor(sum(target["positions"].numel() for target in batch.targets)).to(device)
        return loss_sum / torch.as_tensor(num_items_in_batch).to(device), entropy.detach(), count
