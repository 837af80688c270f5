"""A real vLLM server in a process of its own, which tests start, kill and start again."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import requests

_UP_SECONDS = 300


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class VllmServer:
    """Serves ``model``, in float32 unless told, so that equality can be tested; use as a context manager."""

    def __init__(
        self,
        model: str,
        log: Path,
        *options: str,
        port: int | None = None,
        name: str = "served",
        dtype: str = "float32",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log, self._environment = log, environment or {}
        self._command = [
            os.environ["KD_VLLM_PYTHON"],
            *("-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype, "--enforce-eager"),
            *options,
        ]

    def start(self) -> None:
        # None of our own paths: the server has packages of its own.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= self._environment
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, cwd=self._log.parent, start_new_session=True
            )
        deadline = time.monotonic() + _UP_SECONDS
        try:
            while not self._answers():
                assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
                time.sleep(0.5)
        except BaseException:
            self.kill()  # nobody else will: it is not entered yet
            raise

    def kill(self) -> None:
        """SIGKILL the server with its workers."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=2).status_code == 200
        except requests.ConnectionError:
            return False

    def __enter__(self) -> "VllmServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
