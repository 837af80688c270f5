"""Rendering conversations for training as the capture rendered them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kd_plugin.cache.joint import JointCache
from kd_plugin.cache.templates import fingerprint, pinned, pinned_tokenizer, prints_time
from kd_plugin.capturing.tokenization import is_conversation


@contextmanager
def rendered_as_captured(trainer: Any, cache: JointCache, processing_class: Any, dataset: Any) -> Iterator[Any]:
    """Have TRL's preparation of ``dataset`` print the time that the capture printed.

    Args:
        trainer: whose ``chat_template`` (TRL 1.16) is the training template that TRL renders with in the place of the
            tokenizer's own, or None.
        cache: what the rows will be joined with.
        processing_class: the tokenizer, whose own template, which is saved, is left alone.
        dataset: the rows; nothing is rendered where they are no conversations.

    Yields:
        The tokenizer to prepare the dataset with.

    Raises:
        ConfigError: the caches printed different times, so that no row can be found in all of them.
    """
    if not is_conversation(next(iter(dataset))):
        yield processing_class
        return
    moment, own = cache.rendered_at, trainer.chat_template
    trainer.chat_template = own if own is None or moment is None else pinned(own, moment)
    try:
        yield pinned_tokenizer(processing_class, moment)
    finally:
        trainer.chat_template = own


def why_not_found(cache: JointCache, processing_class: Any, training_template: str | None, dataset: Any) -> str:
    """Say why conversations may have other tokens than at capture; empty where nothing is known.

    Args:
        cache: that holds none of them.
        processing_class: the tokenizer.
        training_template: what TRL renders with in the place of the tokenizer's own template, or None.
        dataset: the rows as the user gave them.
    """
    if not is_conversation(next(iter(dataset))):
        return ""
    own = processing_class.chat_template
    used = fingerprint(training_template or (own if isinstance(own, str) else None))
    for member in cache.members:
        settings = member.cache.manifest.settings
        if used != (settings.rendered_with or settings.chat_template):
            if training_template is not None:
                return (
                    "With assistant_only_loss=True TRL renders conversations by its training template, and the capture "
                    "rendered them by another: capture with assistant_only=True."
                )
            if settings.rendered_with is not None:
                return (
                    "The capture rendered conversations by a template in the place of the tokenizer's own: set the "
                    "tokenizer's chat_template to it, or assistant_only_loss=True where it is TRL's training template."
                )
            return "The capture rendered conversations by another chat template than training does."
        if settings.rendered_at is None and prints_time(processing_class):
            return (
                "The chat template prints today's date, and the cache does not say which date it printed: it was begun "
                f"on {member.cache.manifest.created[:10]} by an earlier kd-plugin. Capture again."
            )
    return ""
