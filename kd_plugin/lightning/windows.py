"""Which batches an optimizer step takes: those of one accumulation window."""

from __future__ import annotations

from lightning.pytorch import Trainer

from kd_plugin.cache.loader import ResumableLoader
from kd_plugin.errors import ConfigError


def window_end(trainer: Trainer, batch: int) -> int:
    """Return the number in its epoch of the first batch behind the window of ``batch``.

    Lightning steps at the last batch of an epoch whether its window is full or not. Which one is the last depends on
    ``limit_train_batches``, ``overfit_batches`` and the loader. DeepSpeed counts batches itself, over epochs.
    """
    accumulate = trainer.accumulate_grad_batches
    end = (batch // accumulate + 1) * accumulate
    if trainer.strategy.handles_gradient_accumulation:
        return end
    return int(min(end, trainer.num_training_batches))


def window_size(trainer: Trainer, batch: int) -> int:
    """Return the number of batches in the window of ``batch``; the full number where an epoch's end is not known."""
    return window_end(trainer, batch) - batch // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches


def served(trainer: Trainer | None, batches: int) -> int:
    """Return how many of an epoch's ``batches`` make whole windows, where the strategy needs those; else all."""
    if trainer is None or not trainer.strategy.handles_gradient_accumulation:
        return batches
    return batches - batches % trainer.accumulate_grad_batches or batches


def require_whole_windows(trainer: Trainer) -> None:
    """Refuse epochs that end inside a window, where the strategy would fill it up from the next epoch.

    A loader that looks ahead sees one epoch, so the window's tokens would be counted wrong. Other loaders divide each
    batch by its own tokens, which holds wherever the window ends.

    Raises:
        ConfigError: names the numbers, and a limit that fits.
    """
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    strategy, loader = trainer.strategy, trainer.train_dataloader
    if not strategy.handles_gradient_accumulation or not isinstance(loader, ResumableLoader):
        return
    if batches != float("inf") and batches % accumulate:
        whole = int(batches - batches % accumulate)
        way_out = f"limit_train_batches: {whole}" if whole else f"accumulate_grad_batches: {int(batches)} or less"
        raise ConfigError(
            f"An epoch has {int(batches)} batches a rank and accumulate_grad_batches is {accumulate}: under "
            f"{type(strategy).__name__} its last optimizer step would take batches of the next epoch. Set {way_out}."
        )
