"""Several vLLM servers that generate for one student: rows are spread over them, and one that dies is left out."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.rollouts import Drawn
from kd_plugin.rollouts.in_process import Sampling
from kd_plugin.rollouts.vllm.jobs import Job, sampling_arguments
from kd_plugin.rollouts.vllm.settings import EngineSettings
from kd_plugin.settings import values_of
from kd_plugin.teachers.client import Client, RefusedRequest
from kd_plugin.teachers.replies import Asking, Listed
from kd_plugin.teachers.served import Connection

logger = logging.getLogger(__name__)
T = TypeVar("T")
_OF_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank RANK"
_OF_RELOADS = "VLLM_SERVER_DEV_MODE=1"


class EnginePool:
    """The servers, and which of them live.

    Args:
        settings: where they are, and how patiently they are asked.
        sampling: how tokens are drawn.
        end_tokens: ids that end a response.
        vocab_size: ids at or above it are no tokens.
        rows: of the student's head.

    Raises:
        ConfigError: a setting of generation that a server does not have.
    """

    on_each_rank = False

    def __init__(
        self, settings: EngineSettings, sampling: Sampling, end_tokens: Sequence[int], vocab_size: int, rows: int
    ) -> None:
        self.settings, self._sampling, self._rows = settings, sampling, rows
        self._asking = Asking("", None, 0, vocab_size)
        self._fixed = sampling_arguments(sampling, end_tokens, vocab_size, rows)
        self._clients = [
            Client(Connection(**{**values_of(Connection, vars(settings)), "url": url})) for url in settings.addresses
        ]
        self._names: dict[str, str] = {}  # of the student on each server
        self._adapter = f"kd-plugin-{secrets.token_hex(4)}"  # its adapter there: another run must not replace it
        self._dead: set[str] = set()
        self._lock = threading.Lock()
        self.version = -1  # optimizer steps of the weights that the servers have
        workers = settings.max_concurrency * len(self._clients)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rollout-engine")
        self._gate = threading.Condition()
        self._is_held, self._under_way = False, 0
        self._busy, self._since = 0.0, time.monotonic()

    @property
    def live(self) -> list[str]:
        """Addresses of the servers that are asked."""
        return [client.root for client in self._clients if client.root not in self._dead]

    @property
    def names(self) -> dict[str, str]:
        """Addresses of the servers that are asked, and how each calls the student."""
        return {url: self._names[url] for url in self.live if url in self._names}

    def keep(self, names: Mapping[str, str]) -> None:
        """Ask these servers alone, by these names: what the first rank found, all go by."""
        with self._lock:
            self._dead |= {client.root for client in self._clients if client.root not in names}
            self._names = dict(names)

    # Weights

    def load(self, directory: str, version: int) -> None:
        """Have every live server take the weights of a directory.

        Raises:
            ConfigError: a server was started without what this needs, or does not see the directory.
            ServerError: none is left.
        """
        for client in self._alive():
            if self.version < 0:
                self._load(client, directory)  # a server that is not there at the start was named wrongly
            else:
                self._surviving(client, lambda client: self._load(client, directory))
        self._require_any()
        self.version = version

    def _load(self, client: Client, directory: str) -> None:
        adapter = self.settings.sync == "adapter"
        if client.root not in self._names:
            self._names[client.root] = self._adapter if adapter else str(self._base(client)["id"])
        needs = _OF_ADAPTERS if adapter else _OF_RELOADS
        try:
            if adapter:
                body = {"lora_name": self._adapter, "lora_path": directory, "load_inplace": True}
                client.tell("/v1/load_lora_adapter", body)
                return
            if self.settings.sync == "reload":  # by `nccl` they are there
                body = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
                client.tell("/collective_rpc", body)
            client.tell("/reset_prefix_cache", {})
        except RefusedRequest as error:
            raise ConfigError(
                f"{client.root} does not take the student's weights with sync={self.settings.sync!r}: status "
                f"{error.status}, {error.says!r}. Start it with {needs}, vLLM 0.32 or later, and let it see "
                f"{directory} under the same path."
            ) from error

    def forget_adapter(self) -> None:
        """Have the servers that live drop the student's adapter, if they have it; one that does not answer is left."""
        for client in self._alive() if self.settings.sync == "adapter" else ():
            if self._names.pop(client.root, None) is None:
                continue
            try:
                client.tell("/v1/unload_lora_adapter", {"lora_name": self._adapter})
            except ServerError as error:
                logger.warning("%s keeps the student's adapter %s: %s", client.root, self._adapter, error)

    def greet(self, url: str) -> Mapping[str, Any]:
        """Have a server asked by the name of the base that it serves, and return what it says of it; no weights move.

        Raises:
            ConfigError: it serves another model, or several and none is named.
            ServerError: it does not answer.
        """
        served = self._base(self._client(url))
        self._names[url] = str(served["id"])
        return served

    def _client(self, url: str) -> Client:
        (client,) = (one for one in self._clients if one.root == url)
        return client

    def _base(self, client: Client) -> Mapping[str, Any]:
        """Return what a server says of the student's base; an adapter of an earlier run is no other model."""
        models = client.get("/v1/models")
        bases = {str(one["id"]): one for one in models["data"] if not one.get("parent")}
        if self.settings.model in bases or (self.settings.model is None and len(bases) == 1):
            found: Mapping[str, Any] = bases[self.settings.model or next(iter(bases))]
            return found
        asked = "none is named" if self.settings.model is None else f"{self.settings.model!r} is asked for"
        raise ConfigError(
            f"The rollout engine at {client.root} serves {', '.join(map(repr, bases)) or 'nothing'}; {asked}. Name one "
            "with rollout_engine.model."
        )

    def listed(self, url: str, prefixes: Sequence[Sequence[int]], tokens: int) -> Listed:
        """Return the likeliest tokens that one server gives after some prefixes, as it generates.

        Of tokens that it generates, not of a prompt: vLLM 0.32 on a CPU dies of ``prompt_logprobs`` with an adapter.

        Args:
            url: of the server.
            prefixes: token ids.
            tokens: listed after each.
        """
        client = self._client(url)
        asking = Asking(url, self._names[url], min(tokens, self._rows), self._rows)
        answer = client.post("/v1/completions", asking.next_request(prefixes) | {"cache_salt": self._salt()})
        return asking.read_next(answer, prefixes)

    # Generation

    def submit(self, jobs: Sequence[Job], first: int = 0) -> list[Future[Drawn]]:
        """Have some responses generated, and return at once; jobs that were submitted before come first.

        Each is generated in requests of ``chunk`` tokens, by whichever server lives: what a dead one had generated
        before goes on elsewhere, and what older weights had generated goes on with newer ones.

        Args:
            jobs: the responses.
            first: number of the server that gets the first; ranks begin at different ones.
        """
        return [self._threads.submit(self._respond, job, first + number) for number, job in enumerate(jobs)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait until no request of this process is under way, and have none begin inside the block."""
        with self._gate:
            self._is_held = True
            self._gate.wait_for(lambda: self._under_way == 0)
        try:
            yield
        finally:
            with self._gate:
                self._is_held = False
                self._gate.notify_all()

    def busy_seconds(self) -> float:
        """Return for how long, since this was asked last, at least one request was under way."""
        with self._gate:
            now = time.monotonic()
            busy = self._busy + (now - self._since if self._under_way else 0.0)
            self._busy, self._since = 0.0, now
            return busy

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a request as under way, once none is held."""
        with self._gate:
            self._gate.wait_for(lambda: not self._is_held)
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1
        try:
            yield
        finally:
            with self._gate:
                self._under_way -= 1
                if not self._under_way:
                    self._busy += time.monotonic() - self._since
                self._gate.notify_all()

    def _respond(self, job: Job, number: int) -> Drawn:
        done = Drawn([], [], [])
        most = self._sampling.max_completion_length
        for turn in itertools.count():
            part, version = self._anywhere(number, job, done, min(self.settings.chunk, most - len(done.ids)), turn)
            done = Drawn(
                done.ids + part.ids,
                (done.logprobs or []) + part.listed.next_logprobs.tolist(),
                (done.versions or []) + [version] * len(part.ids),
            )
            if part.finished or not part.ids or len(done.ids) >= most:
                break
        return done

    def _anywhere(self, number: int, job: Job, done: Drawn, most: int, turn: int) -> tuple[Any, int]:
        """Generate some tokens on the server whose turn it is, or on another if that one is dead."""
        tokens = [*job.prompt, *done.ids]
        while True:
            self._require_any()
            clients = self._alive()
            client = clients[number % len(clients)]
            found = self._surviving(client, lambda client: self._some(client, tokens, most, job.seed + turn))
            if found is not None:
                return found

    def _some(self, client: Client, tokens: list[int], most: int, seed: int) -> tuple[Any, int]:
        sampling = self._sampling
        with self._counted():  # all of it with weights of one version
            asking = replace(self._asking, url=client.root, model=self._names[client.root])
            own = sampling.temperature, sampling.top_p, sampling.top_k
            body = asking.generate_request(tokens, most, seed % 2**31, *own)
            body |= self._fixed | {"cache_salt": self._salt()}
            return asking.read_completion(client.post("/v1/completions", body), tokens, most), self.version

    def _salt(self) -> str:
        # The keys and values of a prefix are those of the weights that read it
        return f"policy-{self.version}"

    def _alive(self) -> list[Client]:
        return [client for client in self._clients if client.root not in self._dead]

    def _surviving(self, client: Client, ask: Callable[[Client], T]) -> T | None:
        """Ask a server; None if it is dead, which is said once."""
        try:
            return ask(client)
        except RefusedRequest:
            raise
        except ServerError as error:
            with self._lock:
                new = client.root not in self._dead
                self._dead.add(client.root)
            if new:
                logger.error(
                    "The rollout engine at %s is left out for the rest of the run (%s). Left: %s.",
                    client.root,
                    error,
                    ", ".join(self.live) or "none",
                )
            return None

    def _require_any(self) -> None:
        if not self.live:
            raise ServerError(
                f"No rollout engine is left of {', '.join(self.settings.addresses)}. Start them again and resume from "
                "the last checkpoint."
            )


def describe(live: Sequence[str], all_of: Sequence[str]) -> Mapping[str, float]:
    """Return what a log shows of a pool: how many servers it has, and how many live."""
    return {"rollouts/engines": float(len(live)), "rollouts/engines_lost": float(len(all_of) - len(live))}
