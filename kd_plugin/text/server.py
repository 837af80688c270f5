"""A writer behind any OpenAI-compatible server: vLLM, SGLang, a hosted R1; by chat or by completions."""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.lineage.sources import Source
from kd_plugin.settings import built, option, other_default, require_known, settings, takes
from kd_plugin.teachers.client import Away, Client, RefusedRequest
from kd_plugin.teachers.served import Connection, names_of
from kd_plugin.text.spending import Prices
from kd_plugin.text.writers import REFUSED, Answer, Ask, Key, Usage, split_reasoning

logger = logging.getLogger(__name__)
_OF_THIS_PROMPT = (400, 413, 422, 451)  # statuses that speak of one prompt: too long, or filtered
_REFUSED_AT_FIRST = 16  # prompts that are refused before any is answered: then it is the request's form
_VERSIONED = re.compile(r"/v\d+\w*$")
_FIELDS_OF_REASONING = ("reasoning_content", "reasoning")
# Words under which servers say that they, and not the model, ended an answer
_BROKEN_OFF = ("insufficient_system_resource", "error", "abort")


class _NotAsked(Exception):
    """Another request has failed for good before this one was sent."""


@settings
class WriterConnection(Connection):
    """A connection to a model that writes: texts take long, so more of them are asked for at a time."""

    max_concurrency: int = other_default(Connection, "max_concurrency", 32)
    stream: bool = option(
        default=False,
        help="Have answers sent as they are written, so that nothing on the way times out while a model thinks.",
    )
    request: Mapping[str, Any] | None = option(
        default=None,
        help="Further fields of each request, such as `{'reasoning_effort': 'high'}`; a None leaves a field out.",
    )


@takes(WriterConnection)
class ServerWriter:
    """A model on a server that writes text; only its terms, its name and its address must be known.

    Nothing is sent until :meth:`check` or the first prompt, so that the license gate can refuse it before.

    Args:
        url: address of the server, with or without ``/v1``; other versions as they are (``.../paas/v4``).
        api: ``chat`` or ``completions``; the latter is given texts as they are.
        prices: of its tokens.

    Raises:
        ConfigError: a setting is out of range, or the url holds credentials.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api: Literal["chat", "completions"] = "chat",
        prices: Mapping[str, float] | Prices | None = None,
        **connection: Any,
    ) -> None:
        require_known("api", api, ("chat", "completions"))
        self.connection = built(WriterConnection, {"url": url, "model": model, **connection})
        self.client = Client(self.connection)
        self.name, self.prices = self.connection.name, Prices.of(prices)
        self._api, self._stream, self._request = api, self.connection.stream, dict(self.connection.request or {})
        self._version = "" if _VERSIONED.search(self.client.root) else "/v1"
        self._admit: Callable[[Sequence[str]], None] | None = None
        self._lock = threading.Lock()
        self._served: str | None = None
        self._names: set[str] = set()
        self._refusals: int | None = 0  # before the first answer; None once there is one

    def __repr__(self) -> str:
        return f"ServerWriter({self.client.root!r}, {self.connection.model!r}, name={self.name!r})"

    @cached_property
    def source(self) -> Source:
        """What it is, known before the first request: endpoint, model name, and where the terms are."""
        return self.connection.source("text")

    @property
    def identity(self) -> dict[str, Any]:
        """The names of the model and what every request says, and not its address."""
        return {
            "kind": "server",
            "model": self.connection.model,
            "repo": self.connection.weights,
            "revision": self.connection.revision,
            "api": self._api,
            "request": self._request,
        }

    def gate(self, admit: Callable[[Sequence[str]], None]) -> None:
        """Let a run check the names that the server gives: those that it lists, and who it says wrote an answer."""
        with self._lock:
            self._admit, self._served = admit, None

    def check(self) -> str:
        """Ask the server once what it serves, and return the name to ask for.

        Raises:
            LicenseRefusedError: by the name that it gives, it serves what may not teach.
            ServerError: it is away, refuses the key, or serves several models and none is named.
        """
        with self._lock:
            if self._served is None:
                with self.client.said(self.name):
                    self._served = self._find()
            return self._served

    def _find(self) -> str:
        try:
            answer = self.client.get(f"{self._version}/models")
            listed = {str(one["id"]): one for one in answer["data"]}
        except RefusedRequest as error:
            if error.status in (401, 403):
                raise ServerError(f"{error} Name the variable that holds its key: api_key_env.") from error
            listed = {}
        except (KeyError, TypeError):
            listed = {}
        wanted = self.connection.model
        if wanted is None and len(listed) == 1:
            wanted = next(iter(listed))
        if wanted is None:
            few = ", ".join(map(repr, list(listed)[:10])) or "no model that it names"
            raise ServerError(f"{self.client.root} serves {few}; no model is named. Name one with model.")
        if wanted not in listed:
            logger.warning("%s does not list %r; it is asked for all the same.", self.client.root, wanted)
        self._admitted([wanted, *names_of(listed.get(wanted, {}))])
        return wanted

    def _admitted(self, names: Sequence[str]) -> None:
        if self._admit is not None:
            self._admit(names)
        self._names.update(names)

    def answers(self, asks: Iterable[tuple[Key, Ask] | None]) -> Iterator[tuple[Key, Answer]]:
        """Answer ``asks``; see :meth:`~kd_plugin.text.writers.Writer.answers`.

        Where one request fails for good, no more are sent, and those under way are answered before it is said.
        An answer is taken before another request is sent in its place: whatever kills the process, no more are asked
        for again than may be under way.
        """
        model = self.check()
        given_up = threading.Event()
        under_way: dict[Future[Answer], Key] = {}
        done: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        source, more, failure = iter(asks), True, None
        with ThreadPoolExecutor(self.client.max_concurrency, thread_name_prefix="writer-server") as pool:
            try:
                while True:
                    while more and len(under_way) < self.client.max_concurrency:
                        try:
                            asked = next(source)
                        except StopIteration:
                            more = False
                            break
                        if asked is None:
                            break
                        future = pool.submit(self._ask, model, asked[1], given_up)
                        under_way[future] = asked[0]
                        future.add_done_callback(done.put)
                    if not under_way:
                        break
                    future = done.get()
                    key, error = under_way.pop(future), future.exception()
                    if isinstance(error, ServerError):
                        failure, more = failure or error, False
                    elif not isinstance(error, _NotAsked):
                        yield key, future.result()
            finally:
                given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask(self, model: str, ask: Ask, given_up: threading.Event) -> Answer:
        if given_up.is_set():
            raise _NotAsked
        try:
            return self._answer(model, ask, given_up)
        except ServerError:
            given_up.set()
            raise

    def _answer(self, model: str, ask: Ask, given_up: threading.Event) -> Answer:
        path = f"{self._version}/{'chat/completions' if self._api == 'chat' else 'completions'}"
        try:
            answer = self.client.ask(path, self._body(model, ask), self._read, given_up)
        except RefusedRequest as error:
            if error.status not in _OF_THIS_PROMPT:
                raise
            self._count_refusal(error)
            return Answer("", ended=REFUSED, says=error.says)
        self._refusals = None
        self._check_name(answer.model)
        return answer

    def _body(self, model: str, ask: Ask) -> dict[str, Any]:
        generation = ask.generation
        if self._api == "chat":
            body: dict[str, Any] = {"messages": ask.messages}
        elif isinstance(ask.prompt, str):
            body = {"prompt": ask.prompt}
        else:
            raise ConfigError(
                f"Writer {self.name!r} is asked by completions, which take a text, and the prompt is a conversation. "
                "Use api: chat, or render the conversations into texts first."
            )
        body |= {
            "model": model,
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "seed": ask.seed,
        }
        if generation.top_k:
            body["top_k"] = generation.top_k
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {**self._request, **ask.request}
        return {key: value for key, value in body.items() if value is not None}

    def _read(self, answer: Any) -> Answer:
        """Read one answer, whole or as events; raises Away where it is not whole."""
        parts = answer if isinstance(answer, list) else [answer]
        content, reasoning, ended, usage, model = "", "", None, None, None
        thought = False
        try:
            for part in parts:
                model = part.get("model") or model
                usage = part.get("usage") or usage
                for choice in part.get("choices") or ():
                    message = choice.get("message") or choice.get("delta") or choice
                    content += _as_text(message.get("content", message.get("text")))
                    shown = next((message[k] for k in _FIELDS_OF_REASONING if message.get(k) is not None), None)
                    thought, reasoning = thought or shown is not None, reasoning + _as_text(shown)
                    ended = choice.get("finish_reason") or ended
        except (AttributeError, TypeError, KeyError) as error:
            raise ServerError(
                f"{self.client.root} answered in another form than OpenAI's: {str(answer)[:300]!r}. Is it an "
                "OpenAI-compatible server?"
            ) from error
        if ended is None or ended in _BROKEN_OFF:
            raise Away(f"an answer without an end (finish_reason {ended!r})")
        text, inside = (content, None) if thought else split_reasoning(content)
        return Answer(text, reasoning if thought else inside, str(ended), _usage(usage), model)

    def _check_name(self, model: str | None) -> None:
        """Have the name under which an answer comes checked, once: a gateway may pass a prompt on to any model."""
        if model is None or model in self._names:
            return
        with self._lock:
            if model not in self._names:
                self._admitted([*self._names, model])

    def _count_refusal(self, error: RefusedRequest) -> None:
        with self._lock:
            if self._refusals is None:
                return
            self._refusals += 1
            if self._refusals >= _REFUSED_AT_FIRST:
                raise ServerError(
                    f"{error} So it refused each of the first {self._refusals} prompts. Change what every request "
                    "says: max_new_tokens, api, or request (a null leaves a field out that the server does not know)."
                ) from error


def _as_text(content: Any) -> str:
    """Return a message's content, which some servers give in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content)


def _usage(given: Any) -> Usage | None:
    if not isinstance(given, Mapping):
        return None
    details = given.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else given.get("prompt_cache_hit_tokens")
    try:
        read, written = int(given["prompt_tokens"]), int(given.get("completion_tokens") or 0)
        return Usage(read, written, min(int(cached or 0), read))
    except (KeyError, TypeError, ValueError):
        return None
