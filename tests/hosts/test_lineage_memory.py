"""A model in memory carries its lineage from trainer to trainer; no run's record lies beside another's weights."""

import copy
import pickle

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import LicenseRefusedError
from kd_plugin.lineage import load_record, verify
from kd_plugin.lineage.start import carried_by, student_source
from kd_plugin.teachers import LocalTeacher, ServerTeacher
from kd_plugin.trl import (
    LicenseLineageCallback,
    OfflineKDConfig,
    OfflineKDTrainer,
    TeacherPanelConfig,
    TeacherPanelTrainer,
)
from tests.fake_vllm import Behaviour, fake_vllm
from tests.hosts.runs import prompts, settings
from tests.tiny import byte_tokenizer, save_tiny

ROWS = [{"prompt": "a?", "completion": f" b{i}"} for i in range(4)]
TOKENS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of two teachers of different licences."""
    place = tmp_path_factory.mktemp("taught")
    found = {}
    for seed, licence in ((2, "llama3.1"), (3, "mit")):
        teacher = LocalTeacher(save_tiny(place / licence, seed=seed, license=licence))
        found[licence] = str(capture(ROWS, teacher, place / f"c{seed}", targets=TopK(4), progress=False).path)
    return found


@pytest.fixture
def model(student_dir):
    return AutoModelForCausalLM.from_pretrained(student_dir)


def offline(model, cache, place, **lineage):
    return OfflineKDTrainer(
        model,
        OfflineKDConfig(**settings(place, max_steps=1), lineage=lineage or None),
        processing_class=byte_tokenizer(),
        teacher_cache=cache,
    )


def plain(model, place, callbacks=(), rows=TOKENS, **kwargs):
    arguments = TrainingArguments(**settings(place, max_steps=1, **kwargs), remove_unused_columns=False)
    return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def licences(directory):
    return {i for node in load_record(directory)["nodes"] for i in node.get("licenses", ())}


def test_a_second_trainer_starts_from_what_the_first_made(model, caches, tmp_path):
    first = offline(model, caches["llama3.1"], tmp_path / "1")
    first.train()
    first.save_model(tmp_path / "first")
    second = offline(first.model, caches["mit"], tmp_path / "2")
    second.train()
    second.save_model(tmp_path / "second")
    second.model.save_pretrained(tmp_path / "direct")
    for name in ("second", "direct"):
        record = load_record(tmp_path / name)
        assert {"llama3.1", "mit"} <= licences(tmp_path / name) and verify(tmp_path / name).exit_code != 2
        assert record["run"]["id"] != load_record(tmp_path / "first")["run"]["id"]
        (edge,) = [e for e in record["edges"] if e["from"] == "self" and e["kind"] == "initialized_from"]
        (parent,) = [n for n in record["nodes"] if n["id"] == edge["to"]]
        assert parent["kind"] == "checkpoint" and parent["details"]["step"] == 1


def test_trainers_that_were_built_before_either_trained_do_not_lose_each_other(model, caches, tmp_path):
    second = plain(model, tmp_path / "2", [LicenseLineageCallback()])
    offline(model, caches["llama3.1"], tmp_path / "1").train()
    model.__dict__.pop("forward", None)
    second.train()
    model.save_pretrained(tmp_path / "direct")
    assert "llama3.1" in licences(tmp_path / "direct")
    assert load_record(tmp_path / "direct")["run"]["method"] == "fine_tuning"


def test_what_the_first_run_was_made_from_is_judged_by_the_seconds_declarations(model, caches, tmp_path):
    offline(model, caches["llama3.1"], tmp_path / "1").train()
    with pytest.raises(LicenseRefusedError, match="700 million"):
        offline(model, caches["mit"], tmp_path / "2", use={"mau_over_700m_at_release": True})


def test_a_trainer_without_lineage_ends_the_first_runs_word(model, caches, tmp_path):
    first = offline(model, caches["llama3.1"], tmp_path / "1")
    first.train()
    model.save_pretrained(tmp_path / "whole")
    assert verify(tmp_path / "whole").exit_code != 3
    model.__dict__.pop("forward", None)
    plain(model, tmp_path / "2", save_strategy="steps", save_steps=1).train()
    model.save_pretrained(tmp_path / "after")
    for place in (tmp_path / "2" / "checkpoint-1", tmp_path / "after"):
        assert verify(place).exit_code == 3, "the first run says nothing of weights that another trainer changed"


def test_moving_and_casting_is_no_training(model, caches, tmp_path):
    offline(model, caches["mit"], tmp_path / "1").train()
    model.to("cpu").half().save_pretrained(tmp_path / "half")
    assert "mit" in licences(tmp_path / "half")


def test_a_plain_trainer_with_the_callback_takes_over(model, caches, tmp_path):
    offline(model, caches["llama3.1"], tmp_path / "1").train()
    model.__dict__.pop("forward", None)
    plain(model, tmp_path / "2", [LicenseLineageCallback()]).train()
    model.save_pretrained(tmp_path / "after")
    record = load_record(tmp_path / "after")
    assert record["run"]["method"] == "fine_tuning" and "llama3.1" in licences(tmp_path / "after")


def test_a_trained_model_teaches_under_what_taught_it(model, caches, tmp_path):
    offline(model, caches["llama3.1"], tmp_path / "1").train()
    cache = capture(
        ROWS, LocalTeacher(model, tokenizer=byte_tokenizer()), tmp_path / "c", targets=TopK(4), progress=False
    )
    assert "llama3.1" in {i for node in cache.manifest.lineage["nodes"] for i in node.get("licenses", ())}


def test_copies_carry_it_along(model, caches, tmp_path):
    offline(model, caches["llama3.1"], tmp_path / "1").train()
    digest = student_source(model).record["digest"]
    assert student_source(copy.deepcopy(model)).record["digest"] == digest
    mark = carried_by(model)
    assert pickle.loads(pickle.dumps(mark)).record()["digest"] == digest


def test_a_model_that_was_never_trained_carries_nothing(model, caches, tmp_path):
    offline(model, caches["llama3.1"], tmp_path / "1")
    assert student_source(model).record is None


def test_the_callback_on_another_trainer_looks_at_its_rows(model, tmp_path):
    place = tmp_path / "1"
    trainer = plain(model, place, [callback := LicenseLineageCallback()], save_strategy="steps", save_steps=1)
    trainer.train()
    assert "undeclared_dataset" in {f.code for f in callback.run.verdict.findings}
    rows = Dataset.from_list([{**row, "model": "gpt-4o"} for row in TOKENS])
    with pytest.raises(LicenseRefusedError, match="OpenAI"):
        plain(model, tmp_path / "2", [LicenseLineageCallback()], rows=rows).train()


@pytest.mark.parametrize("host", ["trl", "lightning"])
def test_a_server_that_says_it_serves_a_closed_model_gets_no_prompt(host, student_dir, teacher_dir, tmp_path):
    from kd_plugin.lightning import KDDataModule, TeacherPanelModule
    from tests.lightning.help import trainer as lightning_trainer

    local, tokenizer = LocalTeacher(teacher_dir, dtype="float32"), byte_tokenizer()
    with fake_vllm(local.model, tokenizer, Behaviour(name="gpt-4o")) as (url, behaviour):
        teacher = {"url": url, "repo": teacher_dir, "top_k": 8}
        (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"prompt": "q{i}"}}' for i in range(4)))
        with pytest.raises(LicenseRefusedError, match="OpenAI"):
            if host == "trl":
                TeacherPanelTrainer(
                    model=student_dir,
                    teacher_models={"t": ServerTeacher(**teacher, name="t")},
                    args=TeacherPanelConfig(
                        **settings(tmp_path / "o", max_steps=1), max_completion_length=4, estimator="topk_tail"
                    ),
                    train_dataset=prompts(),
                ).train()
            else:
                module = TeacherPanelModule(
                    student_dir, teacher_models={"t": ServerTeacher(**teacher, name="t")}, max_completion_length=4,
                    estimator="topk_tail",
                )  # fmt: skip
                data = KDDataModule(prompts=str(tmp_path / "rows.jsonl"), batch_size=2)
                lightning_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        assert {path for path, _, _ in behaviour.requests} == {"/v1/models"}
