"""Configuration of offline KD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import SFTConfig

from kd_plugin.divergence import Divergence
from kd_plugin.divergence.objective import OfflineObjective
from kd_plugin.errors import ConfigError
from kd_plugin.trl.shared_fields import DistillationFields


@dataclass
class OfflineKDConfig(DistillationFields, SFTConfig):
    """What TRL's ``SFTConfig`` holds, and how the captured targets are fitted.

    Every inherited field keeps its meaning. The loss of a token is
    ``kd_weight * D(teacher, student) + ce_weight * cross-entropy``, summed over the tokens whose label is not
    -100 and divided by their number in the global batch. A token with a label and no target is an error, unless
    ``allow_partial``: then the divergence is a mean over the tokens that have a target.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "lineage", "teacher_cache"]

    teacher_cache: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Directory of the teacher cache, or a mapping from directories to weights: an offline panel. Used "
            "where the trainer is given none."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl = KL(teacher || student), reverse_kl, jsd (with `jsd_beta`), or skew_kl (with "
            "`skew_alpha`). Sampled targets allow forward_kl only."
        },
    )
    jsd_beta: float = field(default=0.5, metadata={"help": "Weight of the teacher in jsd, strictly between 0 and 1."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Softmax temperature of the student. Must be the one that the targets were captured at."},
    )
    tail: str = field(
        default="bucket",
        metadata={
            "help": "What stands for the tokens that top-k targets leave out: 'bucket' one outcome on both sides, "
            "'keep' nothing, 'renormalise' scales the listed ones to one. The last two allow forward_kl only."
        },
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy on the dataset's tokens."})
    allow_partial: bool = field(
        default=False,
        metadata={
            "help": "Train on a cache whose capture was interrupted, and on rows and tokens that it does not hold: the "
            "divergence is a mean over the tokens that have a target."
        },
    )
    allow_misaligned: bool = field(
        default=False,
        metadata={"help": "Train on a cache whose targets seem to belong to the token beside, with a warning."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.require_targets_used()
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor smooths one-hot labels; offline KD has the teacher's distribution in their "
                "place. Set it to 0."
            )
        self.objective()

    def require_targets_used(self, own_loss: Any = None) -> None:
        """Refuse what makes ``SFTTrainer`` (1.16) form another loss than the sum that the student's head returns.

        Args:
            own_loss: a function that forms the loss from logits, or None.

        Raises:
            ConfigError: the targets would not be used, or not as they are.
        """
        if own_loss is not None:
            raise ConfigError(
                "compute_loss_func (or a label smoother) forms the loss from logits, so the teacher's targets would "
                "not be used. Leave it out: kd_weight and ce_weight mix distillation and cross-entropy. For another "
                "loss use TRL's SFTTrainer."
            )
        if self.loss_type != "nll":
            raise ConfigError(
                f"loss_type is {self.loss_type!r}; offline KD replaces the loss, so leave it at its default, 'nll'."
            )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ConfigError(
                "dataset_kwargs has skip_prepare_dataset=True, so rows would not be joined to their targets. Leave it "
                "out: rows that are tokenized are not tokenized again."
            )

    def resolved_divergence(self) -> Divergence:
        """Return the divergence that ``divergence``, ``jsd_beta`` and ``skew_alpha`` name."""
        return Divergence(self.divergence, beta=self.jsd_beta, alpha=self.skew_alpha)

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
