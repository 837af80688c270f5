"""The student in the module that holds it, and its output head: the distillation loss inside the model's call.

A trainer calls its model and takes the loss that comes back. This head answers the same call when a batch carries
targets. So everything around the loss stays the trainer's own: the wrappers of DDP, FSDP and DeepSpeed, autocast, PEFT,
gradient accumulation, metrics.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput

from kd_plugin.cache.joining import TARGET, taught_positions
from kd_plugin.divergence.objective import OfflineObjective, load_balancing_loss
from kd_plugin.divergence.sparse import SparseLoss
from kd_plugin.errors import ConfigError, nearest
from kd_plugin.models import naming, output_rows
from kd_plugin.sharding import gathered_heads
from kd_plugin.signals import OutputHead
from kd_plugin.upstream import reference_of


@dataclass
class DistilledOutput(ModelOutput):
    """What the student answers in the place of logits.

    Attributes:
        loss: scalar with a graph, the summed loss over ``num_items_in_batch``, or over the batch's labels without it.
        logits: (B, L, V), where they are asked for; then nothing below is there.
        log_probs: (1,), minus the summed loss: what TRL's ``SFTTrainer`` sums.
        entropy: (N,) of the student at the scored positions, in nats.
        is_top1: (N,) whether the label is the student's most likely token.
        label_mask: (B, L-1) which tokens have a label.
        aux_loss: the router loss of a mixture of experts, where router logits were asked for.
        num_valid_tokens: number of tokens with a label; this and the next two are for TRL before 1.15.
        entropy_sum: of the student, in nats.
        num_correct_tokens: number of labels that are the student's most likely token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    entropy_sum: Tensor | None = None
    num_correct_tokens: Tensor | None = None


class DistillationHead:
    """Patches ``model.forward`` so that batches with targets return the distillation loss.

    Call it after every other patch of the same method, and on the base model of a PEFT model.

    Args:
        model: the student.
        vocab_size: number of real tokens; output rows beyond are padding.
        objective: what is minimised.
        asked_by: the argument of ``forward`` by which the trainer asks for the loss; without it the model answers as
            ever, with logits.

    Attributes:
        forms_logits: whether the logits are wanted beside the loss.

    Raises:
        ConfigError: by the patched ``forward``, where a loss is formed from logits although targets came along.
    """

    def __init__(
        self, model: PreTrainedModel, *, vocab_size: int, objective: OfflineObjective, asked_by: str = "labels"
    ) -> None:
        self.vocab_size = vocab_size
        self.objective = objective
        self.forms_logits = False
        self._loss: SparseLoss | None = None
        inner = model.forward

        def forward(student: Any, *args: Any, **kwargs: Any) -> Any:
            target = kwargs.pop(TARGET, None)
            if target is not None and kwargs.get(asked_by) is not None:
                return self._distilled(student, target, *args, **kwargs)
            if target is not None and student.training and torch.is_grad_enabled():
                raise ConfigError(
                    "The student was asked for logits to train on, though the batch holds a teacher's targets, which "
                    "the loss would not use. Leave compute_loss to the trainer (ce_weight adds cross-entropy), or "
                    "train without targets by the trainer that this one stands on."
                )
            return inner(*args, **kwargs)

        # Trainers keep the columns that the signature names, and `generate` validates its arguments against it
        own = inspect.signature(inner)
        student = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[student, *own.parameters.values()]
        )
        model.forward = types.MethodType(forward, model)

    def take(self) -> SparseLoss | None:
        """Return the loss that was computed last, once: its graph must not outlive the step."""
        loss, self._loss = self._loss, None
        return loss

    def _distilled(
        self, student: Any, target: Any, *args: Any, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
    ) -> DistilledOutput:
        fused = kwargs.pop("fused_lm_head", False)  # TRL's way to ask; it forms logits in a pass of their own
        kwargs["use_cache"] = False
        outputs = student.base_model(*args, **kwargs)
        hidden = outputs.last_hidden_state
        with gathered_heads([OutputHead.from_model(student, self.vocab_size)]) as (head,):
            self._loss = loss = self.objective.loss(hidden, head, target)
            logits = head.logits(hidden) if self.forms_logits and not fused else None
        label_mask = labels[:, 1:] != -100
        count = label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        mean = loss.loss_sum / torch.as_tensor(count).to(loss.loss_sum.device).clamp(min=1)
        if logits is not None:
            return DistilledOutput(loss=mean, logits=logits)
        return DistilledOutput(
            loss=mean,
            log_probs=-loss.loss_sum.reshape(1),
            entropy=loss.entropy,
            is_top1=loss.is_top1,
            label_mask=label_mask,
            aux_loss=load_balancing_loss(student, outputs, kwargs),
            num_valid_tokens=label_mask.sum(),
            entropy_sum=loss.entropy.detach().sum(),
            num_correct_tokens=None if loss.is_top1 is None else loss.is_top1.sum(),
        )


def evaluation_sums(
    objective: OfflineObjective, used: SparseLoss, target: Mapping[str, Any], rows: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what an evaluation averages over tokens: sums over a batch, each with the number of its tokens.

    Args:
        objective: what is minimised.
        used: its loss of the batch.
        target: what a :class:`~kd_plugin.cache.loading.TeacherTargetCollator` gathered.
        rows: how many of the batch's rows count, from the first on; the others repeat some of another batch.

    Returns:
        The parts of the loss, under names that begin with ``loss``; ``entropy``, and ``mean_token_accuracy``.
    """
    ends, positions = target["ends"], target["positions"].to(used.kd.device)
    mine = positions < (ends[rows - 1] if rows else 0)
    count = mine.sum()
    sums = {"entropy": (used.entropy[mine].sum(), count)}
    if objective.kd_weight > 0:
        taught = taught_positions(target).to(mine.device) & mine
        sums["loss"] = objective.kd_weight * used.kd[mine].sum(), taught.sum()
    if objective.ce_weight > 0 and used.nll is not None:
        sums["loss/cross_entropy"] = objective.ce_weight * used.nll[mine].sum(), count
    if used.is_top1 is not None:
        sums["mean_token_accuracy"] = used.is_top1[mine].sum(), count
    return sums


def find_student(module: nn.Module, path: str | None = None) -> PreTrainedModel:
    """Return the transformers causal language model inside ``module``; of a PEFT model its base.

    Args:
        module: the user's module.
        path: attribute path of the student, such as ``"net.model"``; None searches the whole module.

    Raises:
        ConfigError: no such attribute, no causal language model, or several of them.
    """
    owner = type(module).__name__
    if path is not None:
        names = [name for name, _ in module.named_modules() if name]
        if path not in names:
            top = [name for name in names if "." not in name]
            raise ConfigError(
                f"student={path!r} names no part of {owner}; its attributes with modules are "
                f"{', '.join(map(repr, top)) or 'none'}.{nearest(path, names)}"
            )
        module = module.get_submodule(path)
    found: dict[str, PreTrainedModel] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(outer + ".") or outer == "" for outer in found)
        if not inside and _is_causal(part):
            found[name] = part  # type: ignore[assignment]
    where = owner if path is None else f"{owner}.{path}"
    if not found:
        raise ConfigError(
            f"{where} holds no transformers causal language model. Assign one to an attribute, such as self.model = "
            "AutoModelForCausalLM.from_pretrained(...), in __init__, setup or configure_model."
        )
    if len(found) > 1:
        raise ConfigError(
            f"{where} holds {len(found)} causal language models: {', '.join(found)}. Say which one is the student: "
            f"student={next(iter(found))!r}."
        )
    return next(iter(found.values()))


def as_trained(module: nn.Module, student: PreTrainedModel) -> Any:
    """Return the student with its adapter, where the module holds it wrapped by PEFT; other PEFT models are others'."""
    adapted = (m for m in module.modules() if hasattr(m, "peft_config") and any(p is student for p in m.modules()))
    return next(adapted, student)


def config_of(student: PreTrainedModel | str, **where: Any) -> Any:
    """Return the configuration of a student, or of the reference that it will be loaded from, with its ``revision``."""
    if not isinstance(student, str):
        return student.config
    with naming(student):
        return AutoConfig.from_pretrained(student, **where)


def student_rows(model: PreTrainedModel | str) -> int | None:
    """Return the rows of a student's head, from its configuration where it is not loaded."""
    return output_rows(config_of(model) if isinstance(model, str) else model)


def load_tokenizer(model: PreTrainedModel | str, **where: Any) -> Any:
    """Load the tokenizer that a student's ``config`` names.

    Raises:
        ConfigError: it names none.
    """
    reference = reference_of(model)
    if not reference:
        raise ConfigError(
            "The student was built in memory and names no tokenizer, so its token ids cannot be compared with the "
            "teacher's. Pass tokenizer=..."
        )
    with naming(reference):
        return AutoTokenizer.from_pretrained(reference, **where)


def _is_causal(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel) or module.config.is_encoder_decoder:
        return False
    return module.get_output_embeddings() is not None
