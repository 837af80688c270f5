"""A teacher behind vLLM's OpenAI-compatible server."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.settings import built, require_known, takes
from kd_plugin.signals import SparseSignal
from kd_plugin.teachers.agreement import Reference, Repeats, floored, require_same_prefixes
from kd_plugin.teachers.base import Capabilities, Gives
from kd_plugin.teachers.hidden.server import HiddenServerTeacher
from kd_plugin.teachers.replies import Asking, Listed, ServerCompletion
from kd_plugin.teachers.served import Connection, Greeting, ServedModel, require_raw, shake_hands

_LISTED = 64  # tokens a position, unless told


@takes(Connection)
class ServerTeacher(ServedModel):
    """A model on a vLLM server, asked by token ids for ``prompt_logprobs``, or for its last hidden states.

    With ``signal="hidden"`` this makes a :class:`~kd_plugin.teachers.hidden.server.HiddenServerTeacher`, which gives
    the whole distribution: see there. What follows is of the listed tokens.

    Nothing is sent until :meth:`check` or the first score, so that the license gate can refuse it before. Then the
    server is asked what it serves, and must have the same tokenizer and allow ``top_k`` tokens. Whatever is asked for
    later comes with a probe, whose answer must be that of the beginning.

    Args:
        tokenizer: its own, or a directory or hub id to load it from; None takes ``repo``, else ``model``.
        signal: ``top_k``: the likeliest tokens and the one that stands next. ``hidden``: last hidden states.
        top_k: tokens listed a position, or ``"all"`` for the whole distribution (small vocabularies, few tokens:
            an answer then takes about 60 bytes a token of the vocabulary). 64 where it is left out.
        server_dtype: of ``hidden``: dtype that the server computes in.
        placement: of ``hidden``: where the output head is.

    Raises:
        ConfigError: a setting is out of range or belongs to the other signal, or the url holds credentials.
    """

    def __new__(cls, *args: Any, signal: str = "top_k", **options: Any) -> Any:
        """Make the teacher of the signal that is asked for."""
        require_known("signal", signal, ("top_k", "hidden"))
        if signal == "top_k":
            return super().__new__(cls)
        if options.pop("top_k", None) is not None:
            raise ConfigError("top_k is set, and signal='hidden' gives the whole distribution. Leave top_k out.")
        return HiddenServerTeacher(*args, **{k: v for k, v in options.items() if v is not None})

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        signal: Literal["top_k", "hidden"] = "top_k",
        tokenizer: Any = None,
        top_k: int | Literal["all"] | None = None,
        server_dtype: str | None = None,
        placement: Literal["resident", "offload"] | None = None,
        **connection: Any,
    ) -> None:
        for setting, value in (("server_dtype", server_dtype), ("placement", placement)):
            if value is not None:
                raise ConfigError(f"{setting}={value!r} is a setting of signal='hidden', and the signal is 'top_k'.")
        top_k = _LISTED if top_k is None else top_k
        if top_k != "all" and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ConfigError(f"top_k={top_k!r}: expected a whole number of at least 1, or 'all'.")
        super().__init__(built(Connection, {"url": url, "model": model, **connection}), tokenizer)
        self.top_k: int | Literal["all"] = top_k
        self._greeting: Greeting | None = None
        self._repeats = Repeats()
        self._is_raw = False

    def __repr__(self) -> str:
        return (
            f"ServerTeacher({self.client.root!r}, {self.connection.model!r}, name={self.name!r}, top_k={self.top_k!r})"
        )

    @property
    def capabilities(self) -> Capabilities:
        """Its likeliest tokens and the one that stands next, at temperature 1."""
        gives: list[Gives] = ["top_k", "sampled_token"]
        if self.top_k == "all":
            gives.append("all_tokens")
        listed = None if self.top_k == "all" else self.top_k
        return Capabilities("a server", frozenset(gives), temperature=1.0, listed=listed, generates="requests")

    @property
    def identity(self) -> dict[str, Any]:
        """The names of the model, and not its address."""
        source = self.source
        return {"kind": "server", "model": source.model, "repo": source.ref, "revision": source.revision}

    @property
    def listed(self) -> int:
        """Tokens listed a position: ``top_k``, or all that there are."""
        size = self.vocabulary.size
        return size if self.top_k == "all" else min(self.top_k, size)

    @property
    def lists_all(self) -> bool:
        """Whether every token is listed, so that there is no tail."""
        return self.listed == self.vocabulary.size

    @property
    def max_length(self) -> int | None:
        """Tokens that a row may have: the server's limit less the one that it insists on generating."""
        limit = self.check().get("max_model_len")
        return None if limit is None else int(limit) - 1

    def check(self) -> Mapping[str, Any]:
        """Ask the server once what it serves, and refuse it unless that is what was configured.

        Returns:
            The server's own description of the model.

        Raises:
            LicenseRefusedError: by the name that it gives, it serves what may not teach.
            ServerError: it is away, does not serve the model, has no log-probabilities, or has two for one token.
            VocabularyError: its tokenizer is another one.
            ConfigError: it lists fewer than ``top_k`` tokens.
        """
        return self._greet().served

    def reach(self) -> list[float]:
        """Do :meth:`check`, and return what the server said of the long probe, in nats."""
        self.check()
        return floored(self.reference.long).tolist()

    def check_generation(self) -> None:
        """Ask the server once, beside :meth:`check`, for the log-probabilities of what it generates.

        Raises:
            ConfigError: they are those after temperature, top-k and penalties.
            ServerError, VocabularyError: as :meth:`check`.
        """
        greeting = self._greet()
        with self._lock:
            if not self._is_raw:
                require_raw(self.client, self._asking(str(greeting.served["id"])), greeting)
                self._is_raw = True

    @property
    def reference(self) -> Reference:
        """What the server said of the probes when it was first asked; asks it if need be."""
        return self._greet().reference

    def _greet(self) -> Greeting:
        with self._lock:
            if self._greeting is None:
                asking = self._asking(self.connection.model)
                self._greeting = shake_hands(self.client, asking, self.tokenizer, self.name, self._admit)
        return self._greeting

    def score(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> SparseSignal:
        """Score the next token at ``positions``; see :meth:`~kd_plugin.teachers.base.Teacher.score`.

        A server scores tokens that are there, so the last token of a row is no position. Rows are asked for at
        once, ``max_concurrency`` at a time, each up to the token after its last position.

        Raises:
            DataError: a position has no next token, or a row is longer than the server takes.
            ServerError: the server stayed away, or its answer lacks something.
        """
        ids, mask, flat = input_ids.cpu().numpy(), attention_mask.cpu().numpy() != 0, positions.cpu().numpy()
        rows, columns = flat // ids.shape[1], flat % ids.shape[1]
        order, prompts, wanted = [], [], []
        for row in np.unique(rows):
            at = np.flatnonzero(rows == row)
            # Where each column is once the padding is gone.
            places = np.cumsum(mask[row]) - 1
            tokens = ids[row][mask[row]].tolist()
            here = places[columns[at]]
            if not mask[row, columns[at]].all() or here.max() + 1 >= len(tokens):
                raise DataError(
                    f"Teacher {self.name!r}: row {row} is to be scored at padding or at its last token. A server "
                    "scores tokens that are there: positions must have a next token."
                )
            order.append(at)
            prompts.append(tokens[: here.max() + 2])
            wanted.append(here.tolist())
        device = input_ids.device
        if not order:
            empty = torch.zeros(0, self.listed, device=device)
            return SparseSignal(empty.long(), empty, empty.sum(1), None, empty.sum(1))
        answers = self.score_tokens(prompts, wanted)
        back = np.argsort(np.concatenate(order), kind="stable")

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(a, name) for a in answers])[back]).to(device, dtype)

        return SparseSignal(
            joined("ids", torch.int64),
            joined("logprobs", torch.float32),
            joined("tail_logmass", torch.float32),
            None,
            joined("next_logprobs", torch.float32),
        )

    def score_tokens(self, prompts: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Listed]:
        """Score token lists without padding, each at its own positions; ``score`` and captures share this.

        Raises:
            DataError: a row is longer than the server takes.
            ServerError: the server stayed away, or its answer lacks something.
        """
        if not prompts:
            return []
        longest, limit = max(map(len, prompts)), self.max_length
        if limit is not None and longest > limit:
            raise DataError(
                f"A row has {longest} tokens; {self.client.root} takes {limit}. Set max_length={limit}, or start the "
                f"server with --max-model-len {longest + 1}."
            )
        asking = self._asking(str(self.check()["id"]))
        twice = self._repeats.next(len(prompts))
        listed = self.reference.ask(self.client, asking, prompts, positions, twice)
        require_same_prefixes(self.client.root, prompts, positions, listed)
        return listed

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        seeds: Sequence[int],
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[ServerCompletion]:
        """Go on from token lists without padding, one completion each, its distributions from the same pass.

        Args:
            prompts: token ids.
            max_tokens: tokens of each completion at most.
            seeds: of each; the same seed gives the same tokens but for rounding, which depends on the batch.
            temperature: of the sampling; 0 takes the likeliest token.
            top_p: sample from the likeliest tokens that reach this mass.
            top_k: sample from the k likeliest tokens; 0 from all.

        What was generated is scored again, by its own tokens, and must have the log-probabilities that it was generated
        with.

        Raises:
            DataError: a prompt with its completion is longer than the server takes, or a prompt is empty.
            ConfigError: see :meth:`check_generation`.
            ServerError: the server stayed away, its answer lacks something, or its answers do not agree.
        """
        if not prompts:
            return []
        if not all(map(len, prompts)):
            raise DataError(f"A prompt for teacher {self.name!r} is empty; a server goes on from one token at least.")
        served = self.check()
        self.check_generation()
        longest, limit = max(len(p) + m for p, m in zip(prompts, max_tokens, strict=True)), served.get("max_model_len")
        if limit is not None and longest > int(limit):
            raise DataError(
                f"A prompt with its completion may take {longest} tokens; {self.client.root} takes {limit}. Set "
                f"max_length={limit}, or start the server with --max-model-len {longest}."
            )
        asking = self._asking(str(served["id"]))
        bodies = [
            asking.generate_request(prompt, most, seed, temperature, top_p, top_k)
            for prompt, most, seed in zip(prompts, max_tokens, seeds, strict=True)
        ]
        done: list[ServerCompletion] = self.client.post_all(
            "/v1/completions", bodies, lambda i, answer: asking.read_completion(answer, prompts[i], max_tokens[i])
        )
        self._score_again(asking, prompts, done)
        return done

    def _score_again(self, asking: Asking, prompts: Sequence[Sequence[int]], done: Sequence[ServerCompletion]) -> None:
        """Compare the log-probabilities of what was generated with those of the same tokens, given."""
        some = [i for i, one in enumerate(done) if one.ids]
        if some:
            twice = self._repeats.next(len(some))
            kept = [prompts[i] for i in some], [done[i] for i in some]
            self.reference.score_again(self.client, asking, *kept, twice, self.max_length)

    def forget(self) -> None:
        """Have the server asked again what it serves, before anything else is asked of it."""
        self._greeting, self._repeats, self._is_raw = None, Repeats(), False

    def listing(self, top_k: int | Literal["all"]) -> ServerTeacher:
        """Return this teacher with another number of tokens listed a position; it asks the server anew."""
        other = copy.copy(self)
        other.top_k, other._admit = top_k, self._admit
        return other

    def _asking(self, model: str | None) -> Asking:
        return Asking(self.client.root, model, self.listed, self.vocabulary.size)
