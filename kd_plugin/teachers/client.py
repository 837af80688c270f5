"""Requests to a teacher's server: bounded in number, repeated with growing pauses while it is away.

What a server asks for by ``Retry-After`` holds for all requests of a client: none is sent before. A half answer (cut
JSON, a stream that ends too early, fewer bytes than were announced) counts as none.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import requests
import tenacity

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.settings import option, settings

if TYPE_CHECKING:
    from kd_plugin.teachers.served import Connection

logger = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds; 8 retries wait for about 3 minutes in all
_CONNECT_SECONDS = 10.0
_QUIET_SECONDS, _REMIND_SECONDS = 3.0, 30.0  # until a wait is said, and said again
_LONGEST_ASKED = 3600.0  # seconds that a server may ask to wait, and that it may do so without answering anybody
_SHOWN = 300  # characters of a server's answer that a message quotes
_DONE = "[DONE]"  # the last event of a stream
T = TypeVar("T")


@settings
class RequestSettings:
    """How a server is asked: how many requests at a time, how patiently, with which key.

    Raises:
        ConfigError: a number out of range.
    """

    _: KW_ONLY
    timeout: float = option(default=600.0, help="Seconds without a byte until a request counts as failed.")
    max_concurrency: int = option(default=16, help="Requests at a time to each server.")
    max_retries: int = option(
        default=8, help="Further attempts of a request while the server is away, overloaded or restarting."
    )
    api_key_env: str | None = option(
        default=None,
        help="Environment variable with the server's key; read when it is sent, and never kept, written or shown.",
    )

    def __post_init__(self) -> None:
        for name, least in (("timeout", 0.001), ("max_concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}.")


class Away(Exception):
    """The server did not answer, not wholly, or said that it cannot now; worth another attempt.

    Attributes:
        pause: seconds that the server asked for, or None.
    """

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class RefusedRequest(ServerError):
    """The server understood a request and refused it, so that the same request would fail again.

    Attributes:
        status: HTTP status.
        says: the server's own words.
    """

    def __init__(self, url: str, status: int, says: str) -> None:
        super().__init__(f"{url} refused a request with status {status}: {says}")
        self.status, self.says = status, says


@dataclass(frozen=True)
class Raw:
    """An answer of bytes (``application/octet-stream``), which is given in the place of JSON.

    Attributes:
        content: its body.
        headers: of the answer; names in any case.
    """

    content: bytes
    headers: Mapping[str, str]


class Client:
    """Sends requests to one server, as its connection says.

    Args:
        connection: its address and how patiently it is asked.
    """

    def __init__(self, connection: Connection) -> None:
        self.root, self.max_concurrency = connection.root, connection.max_concurrency
        self._timeout, self._attempts = connection.timeout, connection.max_retries + 1
        self._api_key_env = connection.api_key_env
        self._not_before = 0.0  # by the monotonic clock, for all requests
        self._answered = time.monotonic()

    def __repr__(self) -> str:
        return f"Client({self.root!r})"

    @contextmanager
    def said(self, name: str) -> Iterator[None]:
        """Log what is waited for, if what is done inside takes longer than a few seconds, and again now and then.

        Args:
            name: of the teacher, for the message.
        """
        done, began = threading.Event(), time.monotonic()

        def say() -> None:
            pause = _QUIET_SECONDS
            while not done.wait(pause):
                pause = _REMIND_SECONDS
                logger.warning(
                    "Waiting for the server of teacher %r at %s: no answer for %.0f s. Stop with Ctrl-C if it is not "
                    "going to start.",
                    name,
                    self.root,
                    time.monotonic() - began,
                )

        thread = threading.Thread(target=say, name="teacher-server-wait", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def get(self, path: str) -> Any:
        """Return the JSON at ``path``, with retries."""
        return self._patiently("GET", path, None, threading.Event(), _as_it_is)

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON that answers ``body``, with retries."""
        return self._patiently("POST", path, body, threading.Event(), _as_it_is)

    def tell(self, path: str, body: Any) -> None:
        """Post what is answered by its status alone, with retries."""
        self._patiently("POST", path, body, threading.Event(), _status_alone)

    def ask(self, path: str, body: Any, read: Callable[[Any], T], given_up: threading.Event | None = None) -> T:
        """Return what ``read`` makes of the answer to ``body``, with retries.

        Args:
            path: below the server's address.
            body: with ``"stream": True`` the answer is a stream of events, and ``read`` is given the list of them.
            read: raises :class:`Away` where the answer is not whole, so that it is asked for again.
            given_up: set by another thread to end the waiting for another attempt.
        """
        return self._patiently("POST", path, body, given_up or threading.Event(), read)

    def post_all(self, path: str, bodies: Sequence[Any], read: Callable[[int, Any], Any]) -> list[Any]:
        """Post ``bodies``, some at a time, and return what ``read(number, answer)`` makes of each, in their order.

        Raises:
            ServerError: of the first that failed; requests that wait are then dropped.
        """
        given_up = threading.Event()

        def one(number: int, body: Any) -> Any:
            return read(number, self._patiently("POST", path, body, given_up, _as_it_is))

        with ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="teacher-server") as pool:
            futures: list[Future[Any]] = [pool.submit(one, i, body) for i, body in enumerate(bodies)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _patiently(self, method: str, path: str, body: Any, given_up: threading.Event, read: Callable[[Any], T]) -> T:
        obeyed = 0

        def enough(state: tenacity.RetryCallState) -> bool:
            nonlocal obeyed
            error = state.outcome.exception() if state.outcome is not None else None
            # To wait as long as one was told is no failure, as long as the server answers somebody
            if getattr(error, "pause", None) and time.monotonic() - self._answered < _LONGEST_ASKED:
                obeyed += 1
            return given_up.is_set() or state.attempt_number - obeyed >= self._attempts

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Away),
            stop=enough,
            wait=_pause,
            sleep=tenacity.sleep_using_event(given_up),
            before_sleep=self._note,
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body, given_up, read)
        except Away as error:
            attempts = retrying.statistics["attempt_number"]
            raise ServerError(
                f"{self.root}{path} gave no answer in {attempts} {'attempt' if attempts == 1 else 'attempts'}; the "
                f"last error: {error}. What was done is kept. Start the server again and run the same command, or "
                "give it longer with max_retries and timeout."
            ) from error

    def _once(self, method: str, path: str, body: Any, given_up: threading.Event, read: Callable[[Any], T]) -> T:
        url, stream = self.root + path, isinstance(body, dict) and body.get("stream") is True
        while (wait := self._not_before - time.monotonic()) > 0 and not given_up.wait(wait):
            pass
        try:
            # A redirect could lead to a server whose terms nobody checked.
            with self._session.request(
                method, url, json=body, timeout=(_CONNECT_SECONDS, self._timeout), allow_redirects=False, stream=stream
            ) as answer:
                self._require_success(url, answer)
                events = stream and "text/event-stream" in answer.headers.get("Content-Type", "")
                if read is _status_alone:
                    found: list[Any] = [None]
                else:
                    found = _events(answer) if events else [_content(url, answer)]
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Away(f"{type(error).__name__}: {_reason(error)}") from error
        made = read(found if stream else found[0])
        self._answered = time.monotonic()
        return made

    def _require_success(self, url: str, answer: requests.Response) -> None:
        if answer.status_code == 429 or answer.status_code >= 500:
            pause = _asked_pause(answer.headers.get("Retry-After", ""))
            if pause is not None and pause > _LONGEST_ASKED:
                raise ServerError(
                    f"{url} asks to wait {pause / 3600:.1f} hours ({_says(answer)}). What was done is kept. Run the "
                    "same command again then."
                )
            if pause is not None:
                self._not_before = max(self._not_before, time.monotonic() + pause)
            raise Away(f"status {answer.status_code}: {_says(answer)}", pause)
        if answer.status_code != 200:
            raise RefusedRequest(url, answer.status_code, _says(answer))

    @cached_property
    def _session(self) -> requests.Session:
        session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=self.max_concurrency)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        # What the environment says of proxies and certificates: requests would look it up for each request
        said = session.merge_environment_settings(self.root, {}, None, None, None)
        session.proxies, session.verify, session.cert = said["proxies"], said["verify"], said["cert"]
        session.trust_env = False
        session.auth = _Key(self._api_key_env)
        return session

    def _note(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.warning(
            "%s: attempt %d of %d failed (%s); again in %.0f s.",
            self.root,
            state.attempt_number,
            self._attempts,
            error,
            state.upcoming_sleep,
        )


class _Key(requests.auth.AuthBase):
    """Adds the key to a request, if there is one; also keeps requests from adding one out of ~/.netrc."""

    def __init__(self, variable: str | None) -> None:
        self._variable = variable

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._variable is not None:
            key = os.environ.get(self._variable)
            if not key:
                raise ConfigError(f"The environment variable {self._variable}, named by api_key_env, is not set.")
            request.headers["Authorization"] = f"Bearer {key}"
        return request


def _as_it_is(answer: Any) -> Any:
    return answer


def _status_alone(answer: Any) -> None:
    return None


def _content(url: str, answer: requests.Response) -> Any:
    """Read an answer as JSON, or as :class:`Raw` where it says that it is bytes.

    Raises:
        Away: it ends in the middle.
        ServerError: it is something else, such as a page of a proxy.
    """
    if "application/octet-stream" in answer.headers.get("Content-Type", ""):
        return Raw(answer.content, answer.headers)
    try:
        return answer.json()
    except ValueError as error:
        text = answer.text.strip()
        if text[:1] in ("", "{", "["):
            raise Away(f"an answer that ends in the middle: ...{text[-40:]!r}") from error
        what = "HTML" if text[:1] == "<" else "no JSON"
        raise ServerError(
            f"{url} answered {what}: {text[:_SHOWN]!r}. Is it the address of a vLLM or OpenAI-compatible server?"
        ) from error


def _events(answer: requests.Response) -> list[Any]:
    """Read a stream of server-sent events to its end.

    Raises:
        Away: it ends before its end is said, or says an error.
    """
    events: list[Any] = []
    for line in answer.iter_lines():
        if not line.startswith(b"data:"):
            continue  # comments keep the connection alive
        data = line[5:].strip().decode("utf-8", "replace")
        if data == _DONE:
            return events
        try:
            events.append(json.loads(data))
        except ValueError as error:
            raise Away(f"an event of a stream that ends in the middle: ...{data[-40:]!r}") from error
        if isinstance(events[-1], dict) and events[-1].get("error"):
            raise Away(f"an error in the middle of a stream: {str(events[-1]['error'])[:_SHOWN]}")
    raise Away(f"a stream that was cut after {len(events)} events")


def _asked_pause(header: str) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which holds seconds or a date (RFC 9110, 10.2.3)."""
    if header.strip().replace(".", "", 1).isdecimal():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max((until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _pause(state: tenacity.RetryCallState) -> float:
    """Pause as long as the server asked for; else double the pause at each attempt; with jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.pause if isinstance(error, Away) else None
    growing = tenacity.wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE)(state)
    return (asked or growing) + tenacity.wait_random(0, _FIRST_PAUSE / 4)(state)


def _reason(error: Exception) -> str:
    """Return what happened, without the address and the pool that the libraries below repeat."""
    inner = getattr(error.args[0], "reason", error) if error.args else error
    return str(inner).rsplit(": ", 1)[-1]


def _says(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return answer.text[:_SHOWN]
