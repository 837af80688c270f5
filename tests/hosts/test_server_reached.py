"""Servers are reached before anything is loaded, and a wait for one is said."""

import logging
import time

import pytest
import transformers
from lightning.pytorch import Trainer

from kd_plugin import ServerTeacher, TeacherPanel, capture
from kd_plugin.errors import KDError, ServerError
from kd_plugin.lightning import TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.panel.checks import require_one_server
from kd_plugin.teachers import client
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.core.cache_help import prompt_rows
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import prompts, settings
from tests.lightning.help import Plain
from tests.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def no_loading(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", never)


@pytest.fixture
def dead(tokenizer):
    with fake_vllm(None, tokenizer) as (url, _):
        pass
    return url


@pytest.fixture
def without_logprobs(tokenizer):
    with fake_vllm(tiny_llama(), tokenizer, Behaviour(has_logprobs=False)) as (url, _):
        yield url


def teacher(url, teacher_dir):
    return ServerTeacher(url, repo=teacher_dir, license="apache-2.0", max_retries=1)


def trl(url, student_dir, teacher_dir, out):
    args = TeacherPanelConfig(**settings(out, divergence="reverse_kl", estimator="topk_tail"))
    TeacherPanelTrainer(
        student_dir, args=args, train_dataset=prompts(), teacher_models={"t": teacher(url, teacher_dir)}
    )


def trl_by_block(url, student_dir, teacher_dir, out):
    t = {"kind": "server", "url": url, "repo": teacher_dir, "license": "apache-2.0", "max_retries": 1}
    block = {"divergence": "reverse_kl", "estimator": "topk_tail", "teachers": {"t": t}}
    args = TeacherPanelConfig(**settings(out, panel=block))
    TeacherPanelTrainer(student_dir, args=args, train_dataset=prompts())


def lightning(url, student_dir, teacher_dir, out):
    t = {"kind": "server", "url": url, "repo": teacher_dir, "license": "apache-2.0", "max_retries": 1}
    panel = {"divergence": "reverse_kl", "estimator": "topk_tail", "teachers": {"t": t}}
    module = TeacherPanelModule(student_dir, panel=panel)
    Trainer(max_steps=1, logger=False, accelerator="cpu", default_root_dir=out).fit(module, prompts())


def captured(url, student_dir, teacher_dir, out):
    capture(prompt_rows(3), teacher(url, teacher_dir), out / "c", progress=False)


@pytest.mark.parametrize("host", [trl, trl_by_block, lightning, captured])
def test_a_dead_server_is_noticed_before_a_model_is_loaded(
    host, dead, no_loading, student_dir, teacher_dir, tmp_path, caplog
):
    with pytest.raises(ServerError, match=f"{dead}/v1/models gave no answer in 2 attempts"):
        host(dead, student_dir, teacher_dir, tmp_path)
    assert "attempt 1 of 2 failed (ConnectionError: [Errno 111] Connection refused)" in caplog.text
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("host", [trl, trl_by_block, lightning, captured])
def test_a_server_without_log_probabilities_is_refused_before_a_model_is_loaded(
    host, without_logprobs, no_loading, student_dir, teacher_dir, tmp_path
):
    with pytest.raises(ServerError, match="prompt_logprobs of vLLM's /v1/completions are needed"):
        host(without_logprobs, student_dir, teacher_dir, tmp_path)


def test_the_callback_reaches_servers_at_setup(without_logprobs, student_dir, teacher_dir, tmp_path):
    callback = TeacherPanelCorrection(
        {"t": teacher(without_logprobs, teacher_dir)},
        tokenizer=byte_tokenizer(),
        divergence="reverse_kl",
        estimator="topk_tail",
    )
    trainer = Trainer(
        max_steps=1, logger=False, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], barebones=False
    )
    with pytest.raises(ServerError, match="prompt_logprobs"):
        trainer.fit(Plain(student_dir), prompts())


def test_a_wait_is_said_within_seconds(tokenizer, teacher_dir, monkeypatch, caplog):
    """Of a server that takes a connection and says nothing, for which nothing fails and nothing is repeated."""
    monkeypatch.setattr(client, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr(client, "_REMIND_SECONDS", 0.1)
    with fake_vllm(tiny_llama(), tokenizer, Behaviour(delay=0.4)) as (url, _), caplog.at_level(logging.WARNING):
        began = time.monotonic()
        with pytest.raises(KDError):
            ServerTeacher(url, "other", repo=teacher_dir, name="big").check()
        assert time.monotonic() - began < 2
    said = [record.message for record in caplog.records if "Waiting for the server of teacher 'big'" in record.message]
    assert len(said) >= 2 and url in said[0]
    caplog.clear()
    monkeypatch.setattr(client, "_QUIET_SECONDS", 3.0)
    with fake_vllm(tiny_llama(), tokenizer) as (url, _):
        ServerTeacher(url, repo=teacher_dir).check()
    assert "Waiting" not in caplog.text


def test_servers_that_differ_between_ranks_are_refused(tokenizer, teacher_dir, monkeypatch):
    with fake_vllm(tiny_llama(seed=2), tokenizer) as (one, _), fake_vllm(tiny_llama(seed=9), tokenizer) as (two, _):
        here, there = (TeacherPanel({"t": teacher(url, teacher_dir)}) for url in (one, two))
        theirs = {"t": [round(value * 1000) for value in there.teachers["t"].reach()]}

        def most(values, device):
            sign = 1 if sum(values) < 0 else -1  # log-probabilities, or their negatives
            return [max(a, sign * b) for a, b in zip(values, theirs["t"], strict=True)]

        require_one_server(here, "cpu")
        monkeypatch.setattr("kd_plugin.panel.checks.most_of_any_rank", most)
        with pytest.raises(ServerError, match="The server of teacher 't' answers one question in two ways"):
            require_one_server(here, "cpu")
        theirs["t"] = [round(value * 1000) for value in here.teachers["t"].reach()]
        require_one_server(here, "cpu")
