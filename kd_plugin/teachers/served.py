"""A model on a server, whatever is asked of it: how it is reached, and its tokenizer where that is vLLM's."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.sources import Signal, Source
from kd_plugin.models import output_rows
from kd_plugin.settings import option, settings
from kd_plugin.teachers.client import Client, RefusedRequest, RequestSettings
from kd_plugin.vocab import Vocabulary


@settings
class Connection(RequestSettings):
    """A server's address, how it is asked, and where the terms of what it serves are.

    Raises:
        ConfigError: a number out of range, no HTTP address, or one with credentials in it.
    """

    url: str = option(help="Address of the server, `http://host:port`, with or without `/v1`.")
    model: str | None = option(
        default=None, help="Name under which the server knows the model; None takes the only one that it lists."
    )
    name: str = option(default="teacher", help="How metrics and lineage call it.")
    repo: str | None = option(
        default=None,
        help="Hub id or directory of the weights that are served, where their terms can be read; None takes `model`.",
    )
    revision: str | None = option(default=None, help="Branch, tag or commit of `repo`.")
    license: str | None = option(default=None, help="Declared licence where none can be discovered.")

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = urlsplit(self.url)
        if parts.username is not None or parts.password is not None or parts.query:
            raise ConfigError(
                f"The server's url for host {parts.hostname!r} holds credentials or a query, which would end up in "
                "logs. Put the key into an environment variable and name it: api_key_env='MY_KEY'."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={self.url!r}: expected the address of a server, such as http://127.0.0.1:8000.")

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def weights(self) -> str | None:
        """Where the weights that are served, and their terms, can be read: ``repo``, else ``model``."""
        return self.repo or self.model

    def source(self, signal: Signal = "logits") -> Source:
        """Return what is served, known before the first request: endpoint, model name, and where the terms are."""
        return Source(
            name=self.name,
            ref=self.weights,
            revision=self.revision,
            license=self.license,
            endpoint=self.root,
            model=self.model,
            signal=signal,
        )


class ServedModel(ABC):
    """What teachers behind a server have in common.

    Args:
        connection: address, name and terms.
        tokenizer: the teacher's tokenizer, or a directory or hub id to load it from; None takes ``repo``, else
            ``model``.
    """

    def __init__(self, connection: Connection, tokenizer: Any = None) -> None:
        self.connection, self.name = connection, connection.name
        self.client = Client(connection)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._admit: Callable[[Sequence[str]], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied; a copy asks the server again."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_admit")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _admit=None)
        self.forget()

    @abstractmethod
    def forget(self) -> None:
        """Have the server asked again what it serves, before anything else is asked of it."""

    def gate(self, admit: Callable[[Sequence[str]], None]) -> None:
        """Let a run check the names that the server gives for the model, before the first prompt is sent.

        Args:
            admit: called with the names; raises where the model may not teach.
        """
        with self._lock:
            self._admit = admit
            self.forget()

    @cached_property
    def source(self) -> Source:
        """What this teacher is, known before the first request: endpoint, model name, and where the terms are."""
        return self.connection.source()

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, loaded on first use."""
        weights = self.connection.weights
        found = self._tokenizer if self._tokenizer is not None else weights
        if found is None:
            raise ConfigError(
                f"Teacher {self.name!r} at {self.client.root} has no tokenizer. Pass ServerTeacher(..., "
                "tokenizer=...): the tokenizer, its directory or its hub id."
            )
        if not isinstance(found, str | Path):
            return found
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(found, revision=self.connection.revision if found == weights else None)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer can be loaded from {found!r} for teacher {self.name!r} ({error}). Pass tokenizer: its "
                "directory or hub id, where that is not the name of the model on the server."
            ) from error

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The token ids that this teacher speaks; those that its head has rows for, where ``repo`` tells."""
        return Vocabulary.from_tokenizer(self.tokenizer).within(self._rows)

    @property
    def _rows(self) -> int | None:
        from transformers import AutoConfig

        if self.connection.weights is None:
            return None
        try:
            config = AutoConfig.from_pretrained(self.connection.weights, revision=self.connection.revision)
            return output_rows(config)
        except (OSError, ValueError):
            return None  # the weights are elsewhere; the server refuses ids that it does not know

    def server_version(self) -> str:
        """Return the version that the server names, for records."""
        try:
            return str(self.client.get("/version")["version"])
        except (RefusedRequest, KeyError, TypeError):
            return "unknown"
