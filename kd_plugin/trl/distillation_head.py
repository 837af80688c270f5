"""The student's output head, computing the distillation loss in place of logits.

``SFTTrainer`` calls its model with ``fused_lm_head=True`` and sums the ``-log_probs`` that come back. This head
answers the same call when a batch carries targets. So everything around the loss stays TRL's own: DDP, FSDP and
DeepSpeed wrappers, autocast, PEFT, gradient accumulation, metrics.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from kd_plugin.cache.joining import TARGET
from kd_plugin.divergence.objective import OfflineObjective, load_balancing_loss
from kd_plugin.divergence.sparse import SparseLoss
from kd_plugin.errors import ConfigError
from kd_plugin.sharding.gathering import gathered_heads
from kd_plugin.signals import OutputHead


class UsedTargets:
    """The loss that a head computed last, for the trainer to see that it is the one that it trains on."""

    def __init__(self) -> None:
        self.loss: SparseLoss | None = None

    def take(self) -> SparseLoss | None:
        """Return it once: its graph must not outlive the step."""
        loss, self.loss = self.loss, None
        return loss


def add_distillation_head(model: PreTrainedModel, *, vocab_size: int, objective: OfflineObjective) -> UsedTargets:
    """Patch ``model.forward`` so that batches with targets return the distillation loss.

    Call it after TRL's ``add_fused_lm_head`` and on the base model of a PEFT model. In the answer ``log_probs`` is
    one number: minus the summed loss. ``entropy`` and ``is_top1`` are (N,), ``label_mask`` is (B, L-1), as in TRL.

    Args:
        model: the student.
        vocab_size: number of real tokens; output rows beyond are padding.
        objective: what is minimised.

    Returns:
        Where each loss is left that the head computes.

    Raises:
        ConfigError: by the patched ``forward``, where a loss is formed from logits although targets came along.
    """
    inner, used = model.forward, UsedTargets()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.pop(TARGET, None)
        if target is not None and not kwargs.get("fused_lm_head") and self.training and torch.is_grad_enabled():
            raise ConfigError(
                "The student was asked for logits to train on, though the batch holds a teacher's targets, which the "
                "loss would not use. Leave compute_loss to OfflineKDTrainer (ce_weight adds cross-entropy), or train "
                "without targets by TRL's SFTTrainer."
            )
        if target is None or not kwargs.pop("fused_lm_head", False):
            return inner(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        with gathered_heads([OutputHead.from_model(self, vocab_size)]) as (head,):
            used.loss = loss = objective.loss(outputs.last_hidden_state, head, target)
        return FusedCausalLMOutput(
            loss=loss.loss_sum,
            log_probs=-loss.loss_sum.reshape(1),
            entropy=loss.entropy,
            is_top1=loss.is_top1,
            label_mask=labels[:, 1:] != -100,
            aux_loss=load_balancing_loss(self, outputs, kwargs),
        )

    # Keep the signature: `generate` validates its model arguments against it
    forward.__signature__ = getattr(inner, "__signature__", None)  # type: ignore[attr-defined]
    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return used
