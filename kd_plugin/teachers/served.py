"""A model on a vLLM server: its address, its name, its terms and its tokenizer, whatever is asked of it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.sources import Source
from kd_plugin.models import output_rows
from kd_plugin.teachers.client import Client, RefusedRequest
from kd_plugin.vocab import Vocabulary


class ServedModel(ABC):
    """What teachers behind a server have in common.

    Args:
        url: address of the server, ``http://host:port``, with or without ``/v1``.
        model: the name under which the server lists the model; None takes the only one.
        tokenizer: the teacher's tokenizer, or a directory or hub id to load it from; None takes ``repo``, else
            ``model``.
        name: how metrics and lineage call it.
        timeout: seconds until a request without an answer counts as failed.
        max_concurrency: requests at a time.
        max_retries: further attempts of a request while the server is away, overloaded or restarting.
        api_key_env: environment variable with the server's key; it is never written or shown.
        repo: hub id or directory of the weights that are served; None takes ``model``.
        revision: branch, tag or commit of ``repo``.
        license: declared licence where none can be discovered.

    Raises:
        ConfigError: a setting is out of range, or the url holds credentials.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer: Any = None,
        name: str = "teacher",
        timeout: float = 600.0,
        max_concurrency: int = 16,
        max_retries: int = 8,
        api_key_env: str | None = None,
        repo: str | None = None,
        revision: str | None = None,
        license: str | None = None,
    ) -> None:
        self.name = name
        self.client = Client(
            url,
            timeout=timeout,
            max_concurrency=max_concurrency,
            max_retries=max_retries,
            api_key_env=api_key_env,
        )
        self._model, self._repo = model, repo or model
        self._revision, self._license = revision, license
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
        return Source(
            name=self.name,
            ref=self._repo,
            revision=self._revision,
            license=self._license,
            endpoint=self.client.root,
            model=self._model,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, loaded on first use."""
        found = self._tokenizer if self._tokenizer is not None else self._repo
        if found is None:
            raise ConfigError(
                f"Teacher {self.name!r} at {self.client.root} has no tokenizer. Pass ServerTeacher(..., "
                "tokenizer=...): the tokenizer, its directory or its hub id."
            )
        if not isinstance(found, str | Path):
            return found
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(found, revision=self._revision if found == self._repo else None)
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

        if self._repo is None:
            return None
        try:
            return output_rows(AutoConfig.from_pretrained(self._repo, revision=self._revision))
        except (OSError, ValueError):
            return None  # the weights are elsewhere; the server refuses ids that it does not know

    def server_version(self) -> str:
        """Return the version that the server names, for records."""
        try:
            return str(self.client.get("/version")["version"])
        except (RefusedRequest, KeyError, TypeError):
            return "unknown"
