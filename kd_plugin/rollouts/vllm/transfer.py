"""The student's weights from the first rank's GPU to the servers' by NCCL, without a file: vLLM's own weight transfer.

The first rank and all workers of all servers are one group, in which it sends tensor after tensor, each as soon as it
is gathered. That needs vLLM beside the trainer and GPUs on both sides. It was never run: what was run is everything
but the group, with one of the tests' own in its place.
"""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol
from urllib.parse import urlsplit

from torch import Tensor

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.teachers.client import Client, RefusedRequest
from kd_plugin.teachers.served import Connection

NEEDS = 'VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend":"nccl"}\''


class Group(Protocol):
    """What sends to all servers."""

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Send a tensor on the device; every member calls it with one of the same shape."""
        ...


class Transfer:
    """Sends weights to some servers.

    Args:
        addresses: of the servers.
        timeout: seconds that a server has for all weights.
        api_key_env: environment variable with the servers' key.
    """

    def __init__(self, addresses: Sequence[str], *, timeout: float, api_key_env: str | None) -> None:
        # Nothing is asked twice: a server that begins anew would wait for tensors that are not sent again
        once: dict[str, Any] = {"timeout": timeout, "max_concurrency": 1, "max_retries": 0, "api_key_env": api_key_env}
        self._clients = [Client(Connection(url, **once)) for url in addresses]
        self._group: Group | None = None

    def send(self, described: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send all weights, and return when every server has them.

        Args:
            described: ``names``, ``dtype_names`` and ``shapes`` of what follows, in its order.
            tensors: name and value on the device.

        Raises:
            ConfigError: a server was started without what this needs.
            ServerError: one failed; the group cannot be used any more.
        """
        if self._group is None:
            self._group = self._join()
        self._all("/start_weight_update", {})
        answers = self._begin("/update_weights", [{"update_info": dict(described)}] * len(self._clients))
        for _, tensor in tensors:
            # Whoever answered by now failed, or the loop would not be at a tensor yet
            self._end(answers, only_done=True)
            self._group.broadcast(tensor.contiguous(), src=0)
        self._end(answers)
        self._all("/finish_weight_update", {})

    def _join(self) -> Group:
        """Make the group: this process is its first member, the workers of the servers follow."""
        sizes = [int(client.get("/get_world_size")["world_size"]) for client in self._clients]
        address, port = _address([client.root for client in self._clients])
        common = {"master_address": address, "master_port": port, "world_size": 1 + sum(sizes), "packed": False}
        offsets = [1 + sum(sizes[:number]) for number in range(len(sizes))]
        bodies = [{"init_info": {**common, "rank_offset": offset}} for offset in offsets]
        answers = self._begin("/init_weight_transfer_engine", bodies)
        group = open_group(address, port, 1 + sum(sizes))
        self._end(answers)
        return group

    def _all(self, path: str, body: Mapping[str, Any]) -> None:
        self._end(self._begin(path, [body] * len(self._clients)))

    def _begin(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Future[None]]:
        return [
            _beside(functools.partial(client.tell, path, body))
            for client, body in zip(self._clients, bodies, strict=True)
        ]

    def _end(self, answers: Sequence[Future[None]], *, only_done: bool = False) -> None:
        for client, answer in zip(self._clients, answers, strict=True):
            if only_done and not answer.done():
                continue
            try:
                answer.result()
            except RefusedRequest as error:
                raise ConfigError(
                    f"{client.root} does not take the student's weights with sync='nccl': status {error.status}, "
                    f"{error.says!r}. Start it with {NEEDS}, vLLM 0.32 or later."
                ) from error
            except ServerError as error:
                raise ServerError(
                    f"{client.root} failed while weights were sent: {error} The group of all servers is lost with it: "
                    "start them again and resume from the last checkpoint."
                ) from error


def _beside(call: Callable[[], None]) -> Future[None]:
    """Call in a thread of its own; the process may end before it does, for a server may wait for ever."""
    found: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            found.set_exception(error)
        else:
            found.set_result(None)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return found


def open_group(address: str, port: int, members: int) -> Group:
    """Return vLLM's NCCL communicator, as its first member; it returns when all are there.

    Raises:
        ConfigError: vLLM is not installed beside the trainer.
    """
    try:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
    except ImportError as error:
        raise ConfigError(
            "sync='nccl' needs vLLM in the trainer's environment, which brings the group. Install it there, or use "
            "sync='reload'."
        ) from error
    return trainer_init({"master_address": address, "master_port": port, "world_size": members})  # type: ignore[no-any-return]


def send_from_first(
    transfer: Transfer | None, described: Mapping[str, Any], layers: Iterator[Mapping[str, Tensor]]
) -> None:
    """Gather all layers on every rank, and send them from the one that has a ``transfer``.

    Raises:
        ServerError: see :meth:`Transfer.send`; the other ranks gather to the end.
    """
    tensors = (pair for layer in layers for pair in layer.items())
    try:
        if transfer is not None:
            transfer.send(described, tensors)
    finally:
        for _ in tensors:  # whoever stops early would leave the others waiting
            pass


def _address(urls: Sequence[str]) -> tuple[str, int]:
    """Return the address of this machine on its way to the servers, and a port that is free on it.

    A machine's name may stand for 127.0.1.1, which no other reaches.
    """
    found = []
    for parts in map(urlsplit, urls):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((parts.hostname, parts.port or 80))  # of a datagram socket: nothing is sent
            found.append(str(one.getsockname()[0]))
    with socket.socket() as free:
        free.bind(("", 0))
        return next((one for one in found if not one.startswith("127.")), found[0]), int(free.getsockname()[1])
