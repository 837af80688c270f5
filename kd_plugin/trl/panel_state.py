"""Which panel a checkpoint was trained under, and whether a run may go on with another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from kd_plugin.errors import ConfigError
from kd_plugin.panel.identity import read_identity, require_same_panel, write_identity

logger = logging.get_logger(__name__)


class PanelStateCallback(TrainerCallback):
    """Writes ``panel.json`` into every checkpoint.

    Args:
        identity: returns what :func:`~kd_plugin.panel.identity.panel_identity` says; called at the first save.
    """

    def __init__(self, identity: Callable[[], dict[str, Any]]) -> None:
        self._identity = identity

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write it, on the process that writes checkpoints."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir():
            write_identity(checkpoint, self._identity())


def save_what_was_learnt(trainer: Trainer) -> None:
    """Save a checkpoint of the last finished step, unless there is one; for a run that a server's death ends.

    Under DeepSpeed and FSDP saving takes all ranks, and only some may know of the failure, so nothing is saved there.
    """
    args, step = trainer.args, trainer.state.global_step
    if step == 0 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not args.should_save:
        return
    checkpoint = Path(args.output_dir, f"checkpoint-{step}")
    if not checkpoint.is_dir():
        trainer._save_checkpoint(trainer.model_wrapped, None)
        trainer.callback_handler.on_save(args, trainer.state, trainer.control)
    logger.error(
        f"A teacher's server is gone. What was learnt in {step} steps is in {checkpoint}; once the server is back, go "
        "on with trainer.train(resume_from_checkpoint=True)."
    )


def changes_since(checkpoint: str, identity: dict[str, Any], *, allowed: bool) -> list[str]:
    """Compare the panel of a checkpoint with the present one.

    Args:
        checkpoint: its directory.
        identity: of the present panel.
        allowed: take another panel, and say what changed.

    Returns:
        What changed, one sentence each.

    Raises:
        ConfigError: something changed, and that is not allowed.
    """
    before = read_identity(checkpoint) if Path(checkpoint).is_dir() and not allowed else _readable(checkpoint)
    if before is None:
        logger.warning(f"{checkpoint} does not say which panel it was trained under, so it cannot be compared.")
        return []
    return require_same_panel(before, identity, str(checkpoint), allowed=allowed)


def _readable(checkpoint: str) -> dict[str, Any] | None:
    try:
        return read_identity(checkpoint)
    except ConfigError as error:
        logger.warning(str(error))
        return None
