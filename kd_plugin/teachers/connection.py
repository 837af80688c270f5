"""How a server is reached and what it is said to serve: declared once, whatever is asked of it."""

from __future__ import annotations

from urllib.parse import urlsplit

from kd_plugin.errors import ConfigError
from kd_plugin.lineage.sources import Signal, Source
from kd_plugin.settings import option, settings


@settings
class Connection:
    """A server's address, how patiently it is asked, and where the terms of what it serves are.

    Raises:
        ConfigError: a number out of range, no HTTP address, or one with credentials in it.
    """

    url: str = option(help="Address of the server, `http://host:port`, with or without `/v1`.")
    model: str | None = option(
        default=None, help="Name under which the server knows the model; None takes the only one that it lists."
    )
    name: str = option(default="teacher", help="How metrics and lineage call it.")
    timeout: float = option(default=600.0, help="Seconds without a byte until a request counts as failed.")
    max_concurrency: int = option(default=16, help="Requests at a time.")
    max_retries: int = option(
        default=8, help="Further attempts of a request while the server is away, overloaded or restarting."
    )
    api_key_env: str | None = option(
        default=None,
        help="Environment variable with the server's key; read when it is sent, and never kept, written or shown.",
    )
    repo: str | None = option(
        default=None,
        help="Hub id or directory of the weights that are served, where their terms can be read; None takes `model`.",
    )
    revision: str | None = option(default=None, help="Branch, tag or commit of `repo`.")
    license: str | None = option(default=None, help="Declared licence where none can be discovered.")

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username is not None or parts.password is not None or parts.query:
            raise ConfigError(
                f"The server's url for host {parts.hostname!r} holds credentials or a query, which would end up in "
                "logs. Put the key into an environment variable and name it: api_key_env='MY_KEY'."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={self.url!r}: expected the address of a server, such as http://127.0.0.1:8000.")
        for name, value, least in (
            ("timeout", self.timeout, 0.001),
            ("max_concurrency", self.max_concurrency, 1),
            ("max_retries", self.max_retries, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value}: expected at least {least}.")

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
