"""Requests to a teacher's server: bounded in number, repeated with growing pauses while it is away."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import requests
import tenacity

from kd_plugin.errors import ConfigError, ServerError

logger = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds; 8 retries wait for about 3 minutes in all
_CONNECT_SECONDS = 10.0
_QUIET_SECONDS, _REMIND_SECONDS = 3.0, 30.0  # until a wait is said, and said again
_SHOWN = 300  # characters of a server's answer that a message quotes


class _Away(Exception):
    """The server did not answer, or said that it cannot now; worth another attempt."""

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


class Client:
    """A server's address and how patiently it is asked.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        timeout: seconds until a request without an answer counts as failed.
        max_concurrency: requests at a time.
        max_retries: further attempts of a request while the server is away, overloaded or restarting.
        api_key_env: environment variable that holds the key; read when it is sent, and never kept.

    Raises:
        ConfigError: a number out of range, no HTTP address, or one with credentials in it.
    """

    def __init__(
        self, url: str, *, timeout: float, max_concurrency: int, max_retries: int, api_key_env: str | None
    ) -> None:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None or parts.query:
            raise ConfigError(
                f"The server's url for host {parts.hostname!r} holds credentials or a query, which would end up in "
                "logs. Put the key into an environment variable and name it: api_key_env='MY_KEY'."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={url!r}: expected the address of a server, such as http://127.0.0.1:8000.")
        for name, value, least in (("timeout", timeout, 0.001), ("max_concurrency", max_concurrency, 1)):
            if value < least:
                raise ConfigError(f"{name}={value}: expected at least {least}.")
        if max_retries < 0:
            raise ConfigError(f"max_retries={max_retries}: expected 0 or more.")
        self.root = url.rstrip("/").removesuffix("/v1")
        self.max_concurrency = max_concurrency
        self._timeout, self._attempts = timeout, max_retries + 1
        self._api_key_env = api_key_env

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
        return self._patiently("GET", path, None, threading.Event())

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON that answers ``body``, with retries."""
        return self._patiently("POST", path, body, threading.Event())

    def post_all(self, path: str, bodies: Sequence[Any], read: Callable[[int, Any], Any]) -> list[Any]:
        """Post ``bodies``, some at a time, and return what ``read(number, answer)`` makes of each, in their order.

        Raises:
            ServerError: of the first that failed; requests that wait are then dropped.
        """
        given_up = threading.Event()

        def one(number: int, body: Any) -> Any:
            return read(number, self._patiently("POST", path, body, given_up))

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

    def _patiently(self, method: str, path: str, body: Any, given_up: threading.Event) -> Any:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Away),
            stop=tenacity.stop_after_attempt(self._attempts) | tenacity.stop_when_event_set(given_up),
            wait=_pause,
            sleep=tenacity.sleep_using_event(given_up),
            before_sleep=self._note,
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body)
        except _Away as error:
            attempts = retrying.statistics["attempt_number"]
            raise ServerError(
                f"{self.root}{path} gave no answer in {attempts} {'attempt' if attempts == 1 else 'attempts'}; the "
                f"last error: {error}. What was done is kept. Start the server again and run the same command, or "
                "give it longer with max_retries and timeout."
            ) from error

    def _once(self, method: str, path: str, body: Any) -> Any:
        url = self.root + path
        try:
            # A redirect could lead to a server whose terms nobody checked.
            answer = self._session.request(
                method, url, json=body, timeout=(_CONNECT_SECONDS, self._timeout), allow_redirects=False
            )
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise _Away(f"{type(error).__name__}: {_reason(error)}") from error
        if answer.status_code == 429 or answer.status_code >= 500:
            pause = answer.headers.get("Retry-After", "")
            raise _Away(f"status {answer.status_code}: {_says(answer)}", float(pause) if pause.isdigit() else None)
        if answer.status_code != 200:
            raise RefusedRequest(url, answer.status_code, _says(answer))
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(f"{url} answered no JSON: {answer.text[:_SHOWN]!r}. Is it a vLLM server?") from error

    @cached_property
    def _session(self) -> requests.Session:
        session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=self.max_concurrency)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
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


def _pause(state: tenacity.RetryCallState) -> float:
    """Double the pause at each attempt, with jitter, and never be shorter than the server asked for."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = min(error.pause or 0.0, _LONGEST_PAUSE) if isinstance(error, _Away) else 0.0
    growing = tenacity.wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE)(state)
    return max(asked, growing) + tenacity.wait_random(0, _FIRST_PAUSE / 4)(state)


def _reason(error: Exception) -> str:
    """Return what happened, without the address and the pool that the libraries below repeat."""
    inner = getattr(error.args[0], "reason", error) if error.args else error
    return str(inner).rsplit(": ", 1)[-1]


def _says(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return answer.text[:_SHOWN]
