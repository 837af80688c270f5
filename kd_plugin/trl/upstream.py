"""What this host relies on inside TRL: private names, of which some can only be overridden in a trainer's own class.

``tests/contract/test_private_names.py`` holds that no other private name is used, and each behaviour by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

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


class TrlMetricsMixin:
    """Logs what an evaluation measured under TRL's own names.

    TRL's ``log`` adds the prefix.
    """

    _metrics: dict[str, Any]

    def report_evaluated(self, means: dict[str, float], metrics: dict[str, float], prefix: str) -> None:
        """Put the means beside the loss into what is logged."""
        self._metrics["eval"].update({name: [mean] for name, mean in means.items()})


def whole_parameters(trainer: Any) -> AbstractContextManager[Any]:
    """Have the parameters that FSDP shards at the root of a TRL trainer's model whole inside the block."""
    return trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False)  # type: ignore[no-any-return]
