"""A model on a server, whatever is asked of it: how it is reached, what it must say of itself, and its tokenizer.

A server is believed once its own word, its tokenizer and its answers agree with what was configured.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from kd_plugin.errors import ConfigError, ServerError, VocabularyError
from kd_plugin.lineage.sources import Signal, Source
from kd_plugin.models import output_rows
from kd_plugin.settings import option, settings
from kd_plugin.teachers.agreement import ROUNDING, Probes, Reference, listed_distances
from kd_plugin.teachers.client import Client, RefusedRequest, RequestSettings
from kd_plugin.teachers.replies import Asking, Listed
from kd_plugin.vocab import Vocabulary

logger = logging.getLogger(__name__)
_PROBED_TOKENS = 512  # of the vocabulary, evenly spread, that both tokenizers must treat alike
_GENERATED_AFTER = 8  # prefixes of the long probe after which a token is generated
# Under which no two tokens keep the log-probabilities that they had
_PROCESSING = {"temperature": 2.0, "top_k": 2, "repetition_penalty": 2.0}
_RAW = "Start the server with the default --logprobs-mode raw_logprobs"


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
        parts = urlsplit(str(self.url))
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


@dataclass(frozen=True)
class Greeting:
    """What a server said at the handshake.

    Attributes:
        served: its own description of the model: ``id``, ``max_model_len``, ``root``.
        reference: its answers to the probes that go with later requests.
        prefixes: (P,) sequences after which it may be asked to generate a token.
        listed: the distributions after them, as those of given tokens.
    """

    served: Mapping[str, Any]
    reference: Reference
    prefixes: tuple[tuple[int, ...], ...]
    listed: Listed


def shake_hands(
    client: Client, asking: Asking, tokenizer: Any, name: str, admit: Callable[[Sequence[str]], None] | None = None
) -> Greeting:
    """Refuse a server that is not what was configured.

    Args:
        client: the way to the server.
        asking: what will be asked; its model may be None for the only one.
        tokenizer: the teacher's, as configured.
        name: how messages call the teacher.
        admit: told of the names that the server gives for the model, before anything is sent to it; refuses by raising.

    Raises:
        LicenseRefusedError: what it serves by its own word may not teach.
        ServerError: it is away, does not serve the model, has no log-probabilities, or has two for one token.
        VocabularyError: its tokenizer is another one.
        ConfigError: it lists fewer tokens than will be asked for.
    """
    with client.said(name):
        served = find_model(client, asking.model)
        if admit is not None:
            admit(names_of(served))
        asking = replace(asking, model=str(served["id"]))
        compare_tokenizers(client, str(asking.model), asking.vocab_size, tokenizer, name)
        limit = served.get("max_model_len")
        probes = Probes.of(asking.vocab_size, None if limit is None else int(limit) - 1)
        greeting = _probe(client, asking, name, served, probes)
        _require_one_answer(client, asking, greeting)
    return greeting


def require_raw(client: Client, asking: Asking, greeting: Greeting) -> None:
    """Refuse a server whose log-probabilities of what it generates follow temperature, top-k or penalties.

    Raises:
        ConfigError: they do.
        ServerError: it is away, or its answer lacks something.
    """
    found = _generated_after(client, asking, greeting, **_PROCESSING)
    distance = float(found.mean())
    if not distance <= ROUNDING:
        raise ConfigError(
            f"{client.root} gives the log-probabilities of what it generates after temperature, top-k and penalties "
            f"({distance:.2f} nats from those of the model), and a teacher's are needed before them. {_RAW}, or score "
            "completions that are there, for which it gives the model's own."
        )


def _require_one_answer(client: Client, asking: Asking, greeting: Greeting) -> None:
    """Refuse a server that gives given tokens another distribution than those that it generates, both unprocessed."""
    found = _generated_after(client, asking, greeting)
    distance = float(found.mean())
    if not distance <= ROUNDING:
        raise ServerError(
            f"{client.root} gives a token that stands in a prompt another log-probability than one that it generates "
            f"in the same place: {distance:.2f} nats apart on average over {len(found)} places, where rounding "
            f"explains {ROUNDING}. Nothing was used. {_RAW}; name one server, not a balancer before several different "
            "ones; and use one whose prompt_logprobs are vLLM's."
        )


def _generated_after(client: Client, asking: Asking, greeting: Greeting, **sampling: float) -> NDArray[np.float64]:
    """Return how far the distributions of tokens that are generated are from those of tokens that are given, (P,)."""
    answer = client.post("/v1/completions", asking.next_request(greeting.prefixes, **sampling))
    return listed_distances(greeting.listed, asking.read_next(answer, greeting.prefixes))


def names_of(served: Mapping[str, Any]) -> list[str]:
    """Return the names that a server gives for a model: its id, what it was loaded from, an adapter's base.

    Of a path on the server its last part is kept.
    """
    said = [str(served[key]) for key in ("id", "root", "parent") if served.get(key)]
    return [name if not name.startswith((".", "/", "~")) else name.rstrip("/").rsplit("/", 1)[-1] for name in said]


def find_model(client: Client, wanted: str | None) -> Mapping[str, Any]:
    """Return the server's own description of the model that is wanted; None wants the only one.

    Raises:
        ServerError: it is away, or does not serve the model.
    """
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


def compare_tokenizers(client: Client, model: str, size: int, tokenizer: Any, name: str) -> None:
    """Let the server tokenize a text that touches tokens all over a vocabulary of ``size``.

    Raises:
        VocabularyError: its ids are not those of ``tokenizer``.
    """
    spread = np.linspace(0, size - 1, min(size, _PROBED_TOKENS)).astype(int).tolist()
    text = tokenizer.decode(spread, skip_special_tokens=True)
    try:
        answer = client.post("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
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


def _probe(client: Client, asking: Asking, name: str, served: Mapping[str, Any], probes: Probes) -> Greeting:
    """Score the probes, and two tokens with the largest id among them, to learn the server's limits before any work."""
    edges = (0, asking.vocab_size - 1)
    rows = [edges, probes.short, probes.long]
    try:
        answer = client.post("/v1/completions", asking.request(rows))
    except RefusedRequest as error:
        if "vocabulary" in error.says:
            raise VocabularyError(
                f"{client.root} does not know token {edges[1]} ({error.says}), which the tokenizer of teacher "
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
    _, short, long = asking.read(answer, rows, [range(len(row) - 1) for row in rows])
    # Where no token is likely, temperature and top-k move all of them the farthest.
    flattest = np.argsort(long.logprobs[:, 0], kind="stable")[:_GENERATED_AFTER]
    return Greeting(
        served,
        Reference(client.root, probes, short.next_logprobs, long.next_logprobs),
        tuple(probes.long[: at + 1] for at in flattest.tolist()),
        long.at(flattest),
    )
