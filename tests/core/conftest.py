"""A server that answers as a model in this process does, for every test of what is asked of one."""

import pytest

from kd_plugin import LocalTeacher
from kd_plugin.teachers import client
from tests.core.text_help import right
from tests.fake_vllm import fake_vllm
from tests.scripted_writer import Script, scripted_writer


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def local(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


@pytest.fixture
def served(local, tokenizer, short_pauses):
    """Yield the url of the server, and what a test may change of its behaviour."""
    with fake_vllm(local.model, tokenizer) as (url, behaviour):
        yield url, behaviour


@pytest.fixture
def writing():
    """Yield the url of a server that writes right answers, and the script that a test may change."""
    with scripted_writer(Script(write=right)) as found:
        yield found
