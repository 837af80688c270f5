"""Offline KD's loss of a batch: the student's backbone, its head, and the cached targets at the scored positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from kd_plugin.divergence.listed import Tail
from kd_plugin.divergence.projection import require_temperature
from kd_plugin.divergence.sparse import SparseLoss, fused_sparse_divergence
from kd_plugin.divergence.spec import Divergence, DivergenceSettings, choices
from kd_plugin.errors import ConfigError
from kd_plugin.settings import option, require_known, settings
from kd_plugin.signals import OutputHead, SparseSignal


@dataclass(frozen=True)
class OfflineObjective:
    """What offline KD minimises: per token ``kd_weight * D(teacher, student) + ce_weight * cross-entropy``.

    Attributes:
        divergence: which D.
        temperature: of the student's softmax.
        tail: what stands for the tokens that top-k targets leave out.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.

    Raises:
        ConfigError: an unknown tail, a temperature or weights out of range.
    """

    divergence: Divergence
    temperature: float = 1.0
    tail: Tail = "bucket"
    kd_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        require_known("tail", self.tail, get_args(Tail))
        if min(self.kd_weight, self.ce_weight) < 0 or self.kd_weight + self.ce_weight <= 0:
            raise ConfigError(
                f"kd_weight is {self.kd_weight} and ce_weight {self.ce_weight}; expected two numbers of at least 0 "
                "that are not both 0."
            )
        require_temperature(self.temperature)

    @property
    def forms_own(self) -> bool:
        """Whether :meth:`loss` can form the labels' cross-entropy in the same pass: it does."""
        return True

    def without_own(self) -> OfflineObjective:
        """Return the same objective without cross-entropy, for a host that computes that itself."""
        return replace(self, ce_weight=0.0)

    def loss(self, hidden: Tensor, head: OutputHead, target: Mapping[str, Any]) -> SparseLoss:
        """Return the summed loss of a batch.

        Args:
            hidden: (B, L, H) last hidden states of the student.
            head: its output head, cut to the vocabulary.
            target: what :func:`kd_plugin.cache.joining.batch_targets` gathers; under ``others``, where several
                teachers share positions, the same of each further one, without labels; and as ``kd_factor``, where
                not all positions have a target, what the divergence is multiplied by.

        Returns:
            The sum over teachers; of several, ``kd`` is their weighted sum.
        """
        hidden = hidden.to(head.weight.device)
        kd_weight = self.kd_weight * target.get("kd_factor", 1.0)
        loss = self._loss(hidden, head, target, kd_weight)
        if "others" not in target:
            return loss
        kd = loss.kd * target["weights"].to(loss.kd)
        for other in target["others"]:
            further = self._loss(hidden, head, other, kd_weight)
            where = torch.searchsorted(target["positions"], other["positions"]).to(kd.device)
            kd.index_add_(0, where, further.kd * other["weights"].to(kd))
            loss = replace(loss, loss_sum=loss.loss_sum + further.loss_sum)
        return replace(loss, kd=kd)

    def _loss(self, hidden: Tensor, head: OutputHead, target: Mapping[str, Any], kd_weight: float) -> SparseLoss:
        device, labels = hidden.device, target.get("labels")
        signal = SparseSignal(target["ids"], target["logprobs"], target["tail_logmass"], target.get("draws"))
        return fused_sparse_divergence(
            hidden.reshape(-1, hidden.shape[-1]).index_select(0, target["positions"].to(device)),
            head,
            signal.to(device),
            self.divergence,
            temperature=self.temperature,
            tail=self.tail,
            weights=target["weights"].to(device),
            labels=None if labels is None else labels.to(device),
            kd_weight=kd_weight,
            ce_weight=0.0 if labels is None else self.ce_weight,
        )


@settings
class OfflineSettings(DivergenceSettings):
    """Offline KD; how the captured targets are fitted.

    Raises:
        ConfigError: an unknown name, or a temperature or weights out of range.
    """

    divergence: str = option(
        default="forward_kl",
        help=f"{choices(beta='jsd_beta')}. Sampled targets allow forward_kl only.",
    )
    jsd_beta: float = option(default=0.5, help="Weight of the teacher in jsd, strictly between 0 and 1.")
    temperature: float = option(
        default=1.0, help="Softmax temperature of the student. Must be the one that the targets were captured at."
    )
    tail: str = option(
        default="bucket",
        help="What stands for the tokens that top-k targets leave out: 'bucket' one outcome on both sides, 'keep' "
        "nothing, 'renormalise' scales the listed ones to one. The last two allow forward_kl only.",
    )
    kd_weight: float = option(default=1.0, help="Weight of the divergence from the teacher.")
    ce_weight: float = option(default=0.0, help="Weight of the cross-entropy on the dataset's tokens.")
    allow_partial: bool = option(
        default=False,
        help="Train on a cache whose capture was interrupted, and on rows and tokens that it does not hold: the "
        "divergence is a mean over the tokens that have a target.",
    )
    allow_misaligned: bool = option(
        default=False, help="Train on a cache whose targets seem to belong to the token beside, with a warning."
    )

    def __post_init__(self) -> None:
        self.objective()

    def resolved_divergence(self) -> Divergence:
        """Return the divergence that ``divergence``, ``jsd_beta`` and ``skew_alpha`` name."""
        return self.chosen_divergence(self.divergence, beta=self.jsd_beta)

    def objective(self) -> OfflineObjective:
        """Return what the fields say is minimised.

        Raises:
            ConfigError: an unknown name, or a temperature or weights out of range.
        """
        return OfflineObjective(
            self.resolved_divergence(),
            temperature=self.temperature,
            tail=self.tail,  # type: ignore[arg-type]
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
        )


def load_balancing_loss(model: Any, outputs: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return a mixture-of-experts student's auxiliary loss, where its forward pass was asked for router logits.

    Args:
        model: the student.
        outputs: of its backbone.
        kwargs: what the backbone was called with.
    """
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts  # the families' two names
    loss = load_balancing_loss_func(
        outputs.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
    return loss if isinstance(loss, Tensor) else torch.zeros(())
