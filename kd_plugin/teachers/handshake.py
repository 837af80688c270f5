"""What a server must say of itself before it is believed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kd_plugin.errors import ConfigError, ServerError, VocabularyError
from kd_plugin.teachers.client import Client, RefusedRequest
from kd_plugin.teachers.replies import Asking

logger = logging.getLogger(__name__)
_PROBED_TOKENS = 512  # of the vocabulary, evenly spread, that both tokenizers must treat alike


def shake_hands(client: Client, asking: Asking, tokenizer: Any, name: str) -> Mapping[str, Any]:
    """Refuse a server that is not what was configured.

    Args:
        client: the way to the server.
        asking: what will be asked; its model may be None for the only one.
        tokenizer: the teacher's, as configured.
        name: how messages call the teacher.

    Returns:
        The server's own description of the model: ``id``, ``max_model_len``, ``root``.

    Raises:
        ServerError: it is away, or does not serve the model.
        VocabularyError: its tokenizer is another one.
        ConfigError: it lists fewer tokens than will be asked for.
    """
    served = _find_model(client, asking.model)
    asking = replace(asking, model=str(served["id"]))
    _compare_tokenizers(client, asking, tokenizer, name)
    _probe(client, asking, name)
    return served


def _find_model(client: Client, wanted: str | None) -> Mapping[str, Any]:
    answer = client.get("/v1/models")
    try:
        models = {str(model["id"]): model for model in answer["data"]}
    except (KeyError, TypeError) as error:
        raise ServerError(f"{client.root}/v1/models lists no models. Is it a vLLM server?") from error
    if wanted is None and len(models) == 1:
        return next(iter(models.values()))
    if wanted not in models:
        asked = "no model is named" if wanted is None else f"{wanted!r} is asked for"
        raise ServerError(
            f"{client.root} serves {', '.join(map(repr, models)) or 'nothing'}; {asked}. Name one of these with model, "
            "or start the server with --served-model-name."
        )
    return models[wanted]


def _compare_tokenizers(client: Client, asking: Asking, tokenizer: Any, name: str) -> None:
    """Let the server tokenize a text that touches tokens all over the vocabulary."""
    size = asking.vocab_size
    spread = np.linspace(0, size - 1, min(size, _PROBED_TOKENS)).astype(int).tolist()
    text = tokenizer.decode(spread, skip_special_tokens=True)
    try:
        answer = client.post("/tokenize", {"model": asking.model, "prompt": text, "add_special_tokens": False})
    except RefusedRequest as error:
        if error.status != 404:
            raise
        logger.warning("%s has no /tokenize: its tokenizer cannot be compared with ours.", client.root)
        return
    theirs = list(answer["tokens"])
    mine = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if mine != theirs:
        first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(theirs))
        raise VocabularyError(
            f"{client.root} tokenizes a text into other ids than the tokenizer of teacher {name!r} ({len(theirs)} "
            f"tokens against {len(mine)}; the first difference is at token {first}). Pass the tokenizer of the model "
            "that is served."
        )


def _probe(client: Client, asking: Asking, name: str) -> None:
    """Score two tokens, the largest id among them, to learn the server's limits before any work."""
    tokens = [0, asking.vocab_size - 1]
    try:
        answer = client.post("/v1/completions", asking.request(tokens))
    except RefusedRequest as error:
        if "vocabulary" in error.says:
            raise VocabularyError(
                f"{client.root} does not know token {tokens[1]} ({error.says}), which the tokenizer of teacher "
                f"{name!r} has. Pass the tokenizer of the model that is served."
            ) from error
        if "max allowed" in error.says:
            limit = error.says.rsplit("max allowed: ", 1)[-1].split(" ")[0].strip(".")
            fewer = f"top_k={limit} or fewer" if limit.isdigit() else "a smaller top_k"
            raise ConfigError(
                f"Teacher {name!r} is to list {asking.k} tokens a position, more than {client.root} allows: it says "
                f"{error.says!r}. Use {fewer}, or start the server with --max-logprobs "
                f"{-1 if asking.whole else asking.k}."
            ) from error
        raise
    asking.read(answer, tokens, [0])
