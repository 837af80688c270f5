"""The student's output head, computing the distillation loss in place of logits.

``SFTTrainer`` calls its model with ``fused_lm_head=True`` and sums the ``-log_probs`` that come back. This head
answers the same call when a batch carries targets. So everything around the loss stays TRL's own: DDP, FSDP and
DeepSpeed wrappers, autocast, PEFT, gradient accumulation, metrics.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.sparse import Tail, fused_sparse_divergence
from kd_plugin.signals import OutputHead, SparseSignal
from kd_plugin.trl.collator import TARGET


def add_distillation_head(
    model: PreTrainedModel,
    *,
    vocab_size: int,
    divergence: Divergence,
    temperature: float,
    tail: Tail,
    kd_weight: float,
    ce_weight: float,
) -> None:
    """Patch ``model.forward`` so that batches with targets return the distillation loss.

    Call it after TRL's ``add_fused_lm_head`` and on the base model of a PEFT model. In the answer ``log_probs`` is
    one number: minus the summed loss. ``entropy`` and ``is_top1`` are (N,), ``label_mask`` is (B, L-1), as in TRL.

    Args:
        model: the student.
        vocab_size: number of real tokens; output rows beyond are padding.
        divergence: what is minimised.
        temperature: of the student's softmax.
        tail: what stands for the tokens that are not listed.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.
    """
    inner = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.pop(TARGET, None)
        if target is None or not kwargs.pop("fused_lm_head", False):
            return inner(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        head = OutputHead.from_model(self, vocab_size)
        hidden = outputs.last_hidden_state.to(head.weight.device)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, target["positions"].to(hidden.device))
        loss = fused_sparse_divergence(
            hidden,
            head,
            SparseSignal(target["ids"], target["logprobs"], target["tail_logmass"], target.get("draws")).to(
                hidden.device
            ),
            divergence,
            temperature=temperature,
            tail=tail,
            weights=target["weights"].to(hidden.device),
            labels=target["labels"].to(hidden.device),
            kd_weight=kd_weight,
            ce_weight=ce_weight,
        )
        return FusedCausalLMOutput(
            loss=loss.loss_sum,
            log_probs=-loss.loss_sum.reshape(1),
            entropy=loss.entropy,
            is_top1=loss.is_top1,
            label_mask=labels[:, 1:] != -100,
            aux_loss=_load_balancing_loss(self, outputs, kwargs),
        )

    # Keep the signature: `generate` validates its model arguments against it
    forward.__signature__ = getattr(inner, "__signature__", None)  # type: ignore[attr-defined]
    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _load_balancing_loss(model: Any, outputs: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return a mixture-of-experts student's auxiliary loss, where the trainer asked for router logits."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
    return loss if isinstance(loss, Tensor) else torch.zeros(())
