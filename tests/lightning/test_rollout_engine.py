"""Servers generate for a LightningModule's student: the run is that of the transformers engine, or it is stopped."""

import functools
import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from kd_plugin.errors import ConfigError, ServerError
from kd_plugin.lightning import KDDataModule, TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.teachers import LocalTeacher, client
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import LORA, TOPICS, ages_of_tokens
from tests.lightning.help import Plain, trainer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


def fit(
    directory, student, teacher_dir, engine, lora=False, steps=3, lr=1e-2, data=None, resume=None, top_k=1, **options
):
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    module = Plain(get_peft_model(model, LORA) if lora else model, lr=lr)
    panel = TeacherPanelCorrection(
        {"t": LocalTeacher(teacher_dir, dtype="float32")},
        tokenizer=LocalTeacher(student).tokenizer,
        rollout_engine=engine,
        top_k=top_k,
        max_completion_length=8,
        divergence="reverse_kl",
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing="callbacks" in options,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        **{**options, "callbacks": [panel, *options.get("callbacks", ())]},
    )
    if data is not None:
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module
    rows = [{"prompt": f"{TOPICS[i % 8]}?"} for i in range(16)]
    loader = torch.utils.data.DataLoader(rows, 4, collate_fn=lambda some: {"prompt": [row["prompt"] for row in some]})
    trainer.fit(module, loader)
    return module


@pytest.fixture
def served(untied_student_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(untied_student_dir, dtype=torch.float32).eval()
    with fake_vllm(model, tokenizer, Behaviour()) as (url, behaviour):
        yield url, behaviour


@pytest.mark.parametrize("sync", ["adapter", "reload"])
def test_it_trains_as_with_transformers_generation(sync, served, untied_student_dir, teacher_dir, tmp_path):
    engine = {"kind": "vllm", "url": served[0], "sync": sync, "chunk": 3}
    mine = fit(tmp_path / "a", untied_student_dir, teacher_dir, engine, sync == "adapter")
    theirs = fit(tmp_path / "b", untied_student_dir, teacher_dir, None, sync == "adapter")
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4, abs=1e-4) and len(mine.losses) == 3
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert [body["cache_salt"] for path, _, body in served[1].requests if "seed" in body][-1] == "policy-2"
    assert not list((tmp_path / "a" / "rollout-engine").iterdir())


def test_when_the_server_is_gone_what_was_learned_is_saved(served, untied_student_dir, teacher_dir, tmp_path):
    served[1].dies_at = 7
    engine = {"kind": "vllm", "url": served[0], "sync": "reload", "max_retries": 0}
    with pytest.raises(ServerError, match="No rollout engine is left"):
        fit(tmp_path, untied_student_dir, teacher_dir, engine)
    assert [path.name for path in tmp_path.glob("server-step=*.ckpt")] == ["server-step=1.ckpt"]


@pytest.fixture
def data(tmp_path):
    """24 prompts in batches of 2, 12 batches an epoch."""
    rows = [{"prompt": f"{TOPICS[i % 8]} {'x' * (i % 5)}?"} for i in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return functools.partial(KDDataModule, prompts=str(tmp_path / "prompts.jsonl"), batch_size=2, seed=3)


@pytest.fixture
def ages(monkeypatch):
    return ages_of_tokens(monkeypatch)


@pytest.mark.parametrize(("staleness", "accumulate"), [(1, 2), (3, 1)])
def test_servers_generate_ahead_and_no_token_is_older_than_allowed(
    staleness, accumulate, served, data, ages, untied_student_dir, teacher_dir, tmp_path
):
    engine = {"url": served[0], "sync": "reload", "max_staleness": staleness, "chunk": 3}
    options = {"steps": 8, "accumulate_grad_batches": accumulate}
    fit(tmp_path, untied_student_dir, teacher_dir, engine, data=data(), **options)
    assert len(ages) == 8 and set(ages[0]) == {0}
    assert all(0 <= age <= staleness for some in ages for age in some)
    assert max(age for some in ages for age in some) == staleness
    if accumulate == 2:  # an epoch has 6 steps, and none of the next is fetched before
        assert set(ages[6]) == {0}
    drawn = [body for path, _, body in served[1].requests if path == "/v1/completions" and "seed" in body]
    assert len({(body["seed"], len(body["prompt"][0])) for body in drawn}) == len(drawn), "each token is drawn once"


def test_a_ready_module_generates_ahead_too(served, data, ages, untied_student_dir, teacher_dir, tmp_path):
    """Its callback is attached by Lightning, and the loader finds it there."""
    engine = {"url": served[0], "sync": "reload", "max_staleness": 1}
    written = {"top_k": 1, "max_completion_length": 8, "rollout_engine": engine, "learning_rate": 1e-2}
    module = TeacherPanelModule(untied_student_dir, teacher_models={"t": teacher_dir}, **written)
    trainer(tmp_path, max_steps=4).fit(module, datamodule=data())
    assert [max(some) for some in ages] == [0, 1, 1, 1]


def test_ahead_each_row_has_the_draws_of_its_own_step(served, data, ages, untied_student_dir, teacher_dir, tmp_path):
    """With a learning rate of 0 all weights are the same, so a run that is ahead has the synchronous run's losses."""
    common = {"steps": 6, "lr": 0.0, "accumulate_grad_batches": 2, "top_k": 0}
    engine = {"url": served[0], "sync": "reload", "chunk": 3}
    found = [
        fit(tmp_path / str(n), untied_student_dir, teacher_dir, engine | {"max_staleness": n}, data=data(), **common)
        for n in (0, 2)
    ]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4) and len(found[0].losses) == 12
    assert {age for some in ages[:6] for age in some} == {0} and 2 in ages[8]


def test_a_resumed_run_generates_anew_what_was_waiting(served, data, ages, untied_student_dir, teacher_dir, tmp_path):
    engine = {"url": served[0], "sync": "reload", "max_staleness": 2}
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}", save_top_k=-1)
    fit(tmp_path, untied_student_dir, teacher_dir, engine, steps=5, data=data(), callbacks=[saving])
    ages.clear()
    resume = {"resume": str(tmp_path / "step=2.ckpt"), "callbacks": [saving]}
    again = fit(tmp_path, untied_student_dir, teacher_dir, engine, steps=5, data=data(), **resume)
    assert len(again.losses) == 3 and set(ages[0]) == {0} and 2 in ages[2]


def test_a_loader_that_does_not_tell_coming_rows_is_refused(served, untied_student_dir, teacher_dir, tmp_path):
    engine = {"url": served[0], "sync": "reload", "max_staleness": 1}
    with pytest.raises(ConfigError, match=r"a DataLoader does not tell the rows of coming steps\. Use KDDataModule"):
        fit(tmp_path, untied_student_dir, teacher_dir, engine)
