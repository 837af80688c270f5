"""What the tests of a real vLLM server share: SmolLM2, a teacher of it in this process, and one server of it."""

import os
from pathlib import Path

import pytest

from kd_plugin import LocalTeacher
from kd_plugin.demo.model import prepare_teacher
from tests.vllm.server import VllmServer


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    models = os.environ.get("KD_VLLM_MODELS")
    # Absolute: the server runs in another directory
    return prepare_teacher(Path(models).resolve() if models else tmp_path_factory.mktemp("models")).ref


@pytest.fixture(scope="session")
def local(smol):
    return LocalTeacher(smol, dtype="float32")


@pytest.fixture(scope="session")
def url(smol, tmp_path_factory):
    """A server costs half a minute to start and next to nothing while nobody asks."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with VllmServer(smol, log, "--max-model-len", "600", "--max-logprobs", "100") as server:
        yield server.url
