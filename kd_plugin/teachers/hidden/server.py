"""A teacher whose body is on a vLLM server and whose output head is here: the whole distribution, from any size.

The server computes the last hidden states, H values a token; the head, which is one tensor of the checkpoint, is read
here and projects them in the loss, as that of a teacher in this process.

Shape suffixes: B rows, L tokens, N scored positions, H hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.settings import built, require_known, takes
from kd_plugin.sharding import is_sharded
from kd_plugin.signals import HiddenSignal, OutputHead
from kd_plugin.teachers.base import Capabilities
from kd_plugin.teachers.hidden.head import Checkpoint, HeldHead
from kd_plugin.teachers.hidden.states import DTYPES, PATH, HiddenGreeting, shake_hands_with_pooler
from kd_plugin.teachers.in_process import Placement
from kd_plugin.teachers.served import Connection, ServedModel

Place = Literal["resident", "offload"]


@takes(Connection)
class HiddenServerTeacher(ServedModel):
    """A model on a vLLM server that gives last hidden states, with its output head read from the checkpoint.

    The server is started with ``--runner pooling --convert embed --pooler-config
    '{"task":"token_embed","use_activation":false}'``. Its signal is that of a teacher in this process: every estimator,
    divergence and way to combine takes it. What is sent back are H values for each token of a row, prompt included, in
    the dtype that the server computes in.

    Nothing is sent and nothing read until :meth:`check`, the first score or :meth:`place`. Then the server's states of
    a few tokens are compared with the checkpoint: see :mod:`kd_plugin.teachers.hidden.states`.

    Args:
        repo: directory or hub id of the weights that are served, in safetensors; None takes ``model``. The output head
            is read from it, and no other weight, unless the checkpoint is small.
        tokenizer: see :class:`~kd_plugin.teachers.served.ServedModel`.
        server_dtype: dtype that the server computes in; ``auto`` for that of the checkpoint.
        placement: of the head. ``resident`` has it where a teacher in this process would be: on each device, or sharded
            over the ranks as the host shards teachers. ``offload`` leaves it in host memory until the loss uses it.

    Raises:
        ConfigError: a setting is out of range, there is no checkpoint to read, or the url holds credentials.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer: Any = None,
        server_dtype: str = "auto",
        placement: Place = "resident",
        **connection: Any,
    ) -> None:
        super().__init__(built(Connection, {"url": url, "model": model, **connection}), tokenizer)
        require_known("server_dtype", server_dtype, ("auto", *DTYPES))
        require_known("placement", placement, get_args(Place))
        if self.connection.weights is None:
            raise ConfigError(
                f"Teacher {self.name!r} at {self.client.root} gives hidden states, and its output head is read from "
                "the checkpoint. Name the directory or hub id of the weights with repo."
            )
        self.placement: Place = placement
        self._server_dtype = server_dtype
        self._placed: Any = None  # what wraps the head, which must not be forgotten
        self._greeting: HiddenGreeting | None = None

    def __repr__(self) -> str:
        return f"ServerTeacher({self.client.root!r}, {self.connection.model!r}, name={self.name!r}, signal='hidden')"

    @property
    def capabilities(self) -> Capabilities:
        """Hidden states, at any temperature; the head may be sharded over the ranks."""
        sharded = self._placed is not None and is_sharded(self._held)
        return Capabilities("a server of hidden states", frozenset({"hidden"}), sharded=sharded)

    @property
    def identity(self) -> dict[str, Any]:
        """The names of the model, and not its address."""
        source = self.source
        return {
            "kind": "server",
            "signal": "hidden",
            "model": source.model,
            "repo": source.ref,
            "revision": source.revision,
        }

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What is served, as it is stored."""
        return Checkpoint(str(self.connection.weights), self.connection.revision)

    @cached_property
    def _held(self) -> HeldHead:
        return HeldHead(self.checkpoint.head(self.vocabulary.size), self.checkpoint.config)

    @cached_property
    def width(self) -> int:
        """H."""
        return int(self.checkpoint.config.get_text_config().hidden_size)

    @property
    def head(self) -> OutputHead:
        """The output head, read on first use; sharded where the host sharded it."""
        return self._held.head

    def forget(self) -> None:
        """Have the server asked again what it serves, before anything else is asked of it."""
        self._greeting = None

    def place(self, placement: Placement) -> None:
        """Have the head be where the host has its teachers; an offloaded one stays in host memory."""
        self._greet()  # compares with the head while this rank has all of it
        if self._placed is not None:
            return
        held = self._held
        self._placed = placement.wrap(held) if self.placement == "resident" else held

    def check(self) -> Mapping[str, Any]:
        """Ask the server once what it serves, and refuse it unless that is the checkpoint.

        Returns:
            The server's own description of the model.

        Raises:
            LicenseRefusedError, ServerError, VocabularyError, ConfigError: see
                :func:`~kd_plugin.teachers.hidden.states.shake_hands_with_pooler`.
        """
        return self._greet().served

    def reach(self) -> list[float]:
        """Do :meth:`check`, and return the log-probabilities of the long probe by the checkpoint's head, in nats."""
        return list(self._greet().logprobs)

    @property
    def max_length(self) -> int | None:
        """Tokens that a row may have."""
        return self._greet().limit

    def _greet(self) -> HiddenGreeting:
        with self._lock:
            if self._greeting is None:
                self._greeting = shake_hands_with_pooler(
                    self.client,
                    self.connection.model,
                    self.checkpoint,
                    self.head,
                    self._server_dtype,
                    self.tokenizer,
                    self.name,
                    self._admit,
                )
        return self._greeting

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> HiddenSignal:
        """Score the next token at ``positions``; see :meth:`~kd_plugin.teachers.base.Teacher.score`.

        Rows are asked for at once, ``max_concurrency`` at a time, each up to its last position.

        Raises:
            DataError: a position is padding, or a row is longer than the server takes.
            ServerError: the server stayed away, or its answer is not that to this question.
        """
        ids, mask, flat = input_ids.cpu().numpy(), attention_mask.cpu().numpy() != 0, positions.cpu().numpy()
        if not len(flat):
            return HiddenSignal(torch.zeros(0, self.width, device=input_ids.device), self.head)
        rows, columns = flat // ids.shape[1], flat % ids.shape[1]
        if not mask[rows, columns].all():
            raise DataError(f"Teacher {self.name!r} is to score a position that is padding.")
        order, prompts, wanted = [], [], []
        for row in np.unique(rows):
            at = np.flatnonzero(rows == row)
            here = (np.cumsum(mask[row]) - 1)[columns[at]]  # where each column is once the padding is gone
            order.append(at)
            prompts.append(ids[row][mask[row]][: here.max() + 1].tolist())
            wanted.append(torch.from_numpy(here))
        states = torch.cat([s.index_select(0, at) for s, at in zip(self.states(prompts), wanted, strict=True)])
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
        return HiddenSignal(states.index_select(0, back).to(input_ids.device), self.head)

    def bytes_per_second(self) -> float:
        """Measure how fast hidden states come, computed and sent, over a few rows of up to 512 tokens."""
        greeting = self._greet()
        row = [number % self.vocabulary.size for number in range(min(512, greeting.limit or 512))]
        began = time.monotonic()
        found = self.states([row] * min(8, self.client.max_concurrency))
        return sum(one.numel() * one.element_size() for one in found) / max(time.monotonic() - began, 1e-9)

    def states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the last hidden states (L, H) of each of ``rows``, token lists without padding.

        Raises:
            DataError: a row is longer than the server takes.
            ServerError: see :meth:`score`.
        """
        greeting = self._greet()
        longest = max(map(len, rows), default=0)
        if greeting.limit is not None and longest > greeting.limit:
            raise DataError(
                f"A row has {longest} tokens; {self.client.root} takes {greeting.limit}. Set "
                f"max_length={greeting.limit}, or start the server with --max-model-len {longest}."
            )
        bodies = [greeting.pooling.request([row, greeting.probe]) for row in rows]

        def read(number: int, answer: Any) -> Tensor:
            found, probe = greeting.pooling.read(answer, [rows[number], greeting.probe])
            greeting.require_probe(probe)
            return found

        found: list[Tensor] = self.client.post_all(PATH, bodies, read)
        return found
