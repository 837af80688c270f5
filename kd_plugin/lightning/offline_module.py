"""Offline KD from a configuration file."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from kd_plugin.divergence import Tail
from kd_plugin.errors import ConfigError
from kd_plugin.lightning.module import StudentModule
from kd_plugin.lightning.offline import OfflineKD


class OfflineKDModule(StudentModule):
    """A student that is fitted to a teacher cache: :class:`StudentModule` with the callback :class:`OfflineKD`.

    Args:
        model: the student, a path or hub id.
        cache: directory of the teacher cache, or a mapping from directories to weights: an offline panel. None takes
            the data module's.
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd`` (with ``jsd_beta``) or ``skew_kl`` (with ``skew_alpha``).
        jsd_beta: weight of the teacher in jsd.
        skew_alpha: share of the teacher in skew_kl's mixture.
        temperature: must be the one that the targets were captured at.
        tail: what stands for the tokens that top-k targets leave out: ``bucket``, ``keep`` or ``renormalise``.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.
        allow_partial: train on a cache whose capture was interrupted, and on tokens with a label and no target.
        allow_misaligned: train on a cache whose targets seem to belong to the token beside, with a warning.
        lineage: a mapping, or a path to YAML, with the keys student, teachers, datasets, use, overrides and run.
        **kwargs: of :class:`StudentModule`.
    """

    def __init__(
        self,
        model: str,
        cache: dict[str, float] | str | None = None,
        divergence: str = "forward_kl",
        jsd_beta: float = 0.5,
        skew_alpha: float = 0.1,
        temperature: float = 1.0,
        tail: Tail = "bucket",
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        allow_partial: bool = False,
        allow_misaligned: bool = False,
        lineage: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.save_hyperparameters()
        self._kd: OfflineKD | None = None

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that adds the divergence; Lightning attaches it."""
        hp = self.hparams
        cache = hp["cache"] or getattr(getattr(self.trainer, "datamodule", None), "hparams", {}).get("cache")
        if cache is None:
            raise ConfigError("No teacher cache is given: set model.cache or data.cache.")
        names = (
            "divergence", "jsd_beta", "skew_alpha", "temperature", "tail", "kd_weight", "ce_weight", "allow_partial",
            "allow_misaligned", "lineage",
        )  # fmt: skip
        self._kd = OfflineKD(cache, **{name: hp[name] for name in names})
        return [self._kd]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the divergence on rows that were kept out, and answer the samples."""
        if "input_ids" in batch and self._kd is not None:
            self._kd.measure(self, batch, lambda seen: self.model(**seen))
        super().validation_step(batch, batch_idx, dataloader_idx)
