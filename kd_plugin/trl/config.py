"""Configuration of offline KD: TRL's own fields, and ours; and what both of TRL's configurations need."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from kd_plugin.divergence.objective import OfflineSettings
from kd_plugin.errors import ConfigError
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.limits import refuse_label_smoothing
from kd_plugin.lineage.config import LineageSettings
from kd_plugin.settings import mappings, mutable, part_of
from kd_plugin.trl.upstream import CROSS_ENTROPY
from kd_plugin.upstream import reference_of

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainingArguments)


def without_bf16(args: TrainingArguments) -> None:
    """Turn off bf16, which TRL takes as its default, where no accelerator is there and the user did not choose it."""
    if args.bf16 is None and not args.fp16 and not args.use_cpu and not is_torch_bf16_gpu_available():
        if os.environ.get("RANK", "0") == "0":
            logger.warning(
                "No accelerator here computes in bf16, so this run is in float32. `bf16: true` would insist."
            )
        args.bf16 = False


def config_of(cls: type[Config], args: Any, model: Any) -> Config:
    """Return a trainer's configuration, one of defaults where none is given.

    Raises:
        ConfigError: one of another class, which cannot say how the student distils.
    """
    if args is None:
        return cls(f"{(reference_of(model) or 'model').split('/')[-1]}-{cls.__name__.removesuffix('Config')}")
    if not isinstance(args, cls):
        raise ConfigError(f"args is a {type(args).__name__}; expected {cls.__name__}, which takes the same fields.")
    return args


def require_sft_loss(args: SFTConfig) -> None:
    """Refuse what makes ``SFTTrainer`` form another loss than the sum that the student's head returns.

    Raises:
        ConfigError: the targets would not be used, or not as they are.
    """
    if args.loss_type not in CROSS_ENTROPY:
        raise ConfigError(f"loss_type is {args.loss_type!r}; offline KD replaces the loss, so leave it at its default.")
    refuse_label_smoothing(args)
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ConfigError(
            "dataset_kwargs has skip_prepare_dataset=True, so rows would not be joined to their targets. Leave it "
            "out: rows that are tokenized are not tokenized again."
        )


@dataclass
class OfflineKDConfig(
    mutable(OfflineSettings),  # type: ignore[misc]
    mutable(EvaluationSettings),  # type: ignore[misc]
    mutable(LineageSettings),  # type: ignore[misc]
    SFTConfig,
):
    """What TRL's ``SFTConfig`` holds, and how the captured targets are fitted.

    Every inherited field keeps its meaning. The loss of a token is
    ``kd_weight * D(teacher, student) + ce_weight * cross-entropy``, summed over the tokens whose label is not
    -100 and divided by their number in the global batch. A token with a label and no target is an error, unless
    ``allow_partial``: then the divergence is a mean over the tokens that have a target.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *SFTConfig._VALID_DICT_FIELDS,
        *mappings(OfflineSettings, EvaluationSettings, LineageSettings),
        "teacher_cache",
    ]

    teacher_cache: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Directory of the teacher cache, or a mapping from directories to weights: an offline panel. Used "
            "where the trainer is given none."
        },
    )
    teacher_text: str | None = field(
        default=None,
        metadata={
            "help": "In the place of teacher_cache: directory of a capture of text (`kd-plugin capture` with targets: "
            "text), on which the student is trained by cross-entropy, whatever its tokenizer."
        },
    )

    def __post_init__(self):
        without_bf16(self)
        super().__post_init__()
        require_sft_loss(self)
        self.settings()

    def settings(self) -> OfflineSettings:
        """Return how the targets are fitted, as it is now, for the rooms that know no host.

        Raises:
            ConfigError: an unknown name, or a temperature or weights out of range.
        """
        return part_of(OfflineSettings, self)
