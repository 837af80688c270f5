"""What this host relies on inside TRL: private names, of which some can only be overridden in a trainer's own class.

``tests/contract/test_private_names.py`` holds that no other private name is used, and each behaviour by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import trl
from packaging.version import Version
from trl import SFTTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from kd_plugin.errors import ConfigError

# What depends on TRL's version; asked nowhere else. From 1.15 on SFTTrainer asks its model for sums over tokens by an
# argument of their own, and DistillationTrainer works on chunks. 1.9 to 1.14 have loss_type chunked_nll for such sums.
PANEL_SINCE = "1.15"
_TRL = Version(trl.__version__)
HAS_PANEL = Version(PANEL_SINCE) <= _TRL
FUSED_HEAD = Version("1.15") <= _TRL
TAKES_CHECKPOINTING = Version("1.16") <= _TRL  # how checkpointing is turned on again after generation
ASKED_BY = "fused_lm_head" if FUSED_HEAD else "labels"
CROSS_ENTROPY = ("nll",) if FUSED_HEAD else ("nll", "chunked_nll")

# Private names of TRL's trainers and configurations (1.16) that ours override, or read as their own
IN_TRAINERS = {
    "_VALID_DICT_FIELDS": "fields of a configuration that the command line may give as JSON",
    "_name": "what the model card calls the trainer",
    "_tag_names": "tags of the model card",
    "_prepare_dataset": "SFTTrainer: tokenizes, truncates and packs; called once for each dataset, in the constructor",
    "_prepare_inputs": "DistillationTrainer: turns rows into a micro-batch, generating once for all of a step",
    "_buffered_inputs": "DistillationTrainer: the micro-batches of a step that are still to come; None at first",
    "_step": "DistillationTrainer: micro-batches so far, by which it knows when to generate",
    "_generate_and_score_completions": "DistillationTrainer: once a generation batch; returns padded tensors by name",
    "_generate_single_turn": "DistillationTrainer: token ids of prompts to token ids of responses",
    "_tool_call_loop": "DistillationTrainer: generates again for the rows whose response calls a tool",
    "_get_train_sampler": "DistillationTrainer: the order of the rows, each generation batch once a micro-batch",
    "_compute_loss": "DistillationTrainer: inside the student's forward pass, so that its weights are gathered",
    "_tokenizer": "DistillationTrainer: the tokenizer, also where processing_class is a processor",
    "_metrics": "both: lists of numbers by mode and name, of which log takes the means",
}


class EpochSampler(RepeatSampler):
    """TRL's order of rows, also in a run that goes on in a later epoch.

    TRL 1.16 draws each epoch's order from one generator and is not told the epoch, so a resumed run begins with the
    order of the first: of the epoch it is in, it trains on some rows twice and on others never.
    """

    def __init__(self, given: RepeatSampler) -> None:
        self.__dict__.update(given.__dict__)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next; transformers does where an epoch begins."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Draw the orders of the epochs before anew, and go through this one's."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        self._epoch += 1
        return iter(super().__iter__())


class SummedLossMixin(SFTTrainer):
    """Has ``SFTTrainer`` take loss and metrics from the student's head, in the way that its version asks for them."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the parent's loss; before TRL 1.15 with metrics from sums, where the head forms no logits."""
        head = getattr(self, "_head", None)
        if head is not None and not FUSED_HEAD:
            self.args.loss_type = "nll" if head.forms_logits else "chunked_nll"
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def refuse_panel(name: str) -> None:
    """Say which TRL the panel needs.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"{name} needs TRL {PANEL_SINCE} or newer, whose DistillationTrainer it builds on; installed is "
        f"{trl.__version__}. Upgrade it (pip install -U trl). kd_plugin.transformers.TeacherPanelMixin needs no TRL, "
        "and OfflineKDTrainer works with yours."
    )


class TrlMetricsMixin:
    """Logs what an evaluation measured under TRL's own names.

    TRL's ``log`` adds the prefix.
    """

    _metrics: dict[str, Any]

    def report_evaluated(self, means: dict[str, float], metrics: dict[str, float], prefix: str) -> None:
        """Put the means beside the loss into what is logged."""
        self._metrics["eval"].update({name: [mean] for name, mean in means.items()})


def unwrapped_for_generation(trainer: Any) -> AbstractContextManager[Any]:
    """Have the student of a TRL trainer ready to generate inside the block, as its own generation has it."""
    args, more = trainer.args, {}
    if TAKES_CHECKPOINTING:
        more = {"gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs}
    return unwrap_model_for_generation(  # type: ignore[no-any-return]
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        generation_kwargs=trainer.generation_kwargs,
        **more,
    )


def whole_parameters(trainer: Any) -> AbstractContextManager[Any]:
    """Have the parameters that FSDP shards at the root of a TRL trainer's model whole inside the block."""
    return trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False)  # type: ignore[no-any-return]
