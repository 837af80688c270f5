"""Each way by which weights leave a trainer leaves its lineage beside them."""

import copy
import json
import shutil

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.errors import LicenseRefusedError, LineageError
from kd_plugin.lineage import verify
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import (
    LicenseLineageCallback,
    OfflineKDConfig,
    OfflineKDTrainer,
    TeacherPanelConfig,
    TeacherPanelTrainer,
)
from tests.hosts.runs import LORA, prompts, settings
from tests.tiny import byte_tokenizer

RUN = {"run": {"id": "test-run", "date": "2026-01-02"}}
ROWS = Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(8)])


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    directory = tmp_path_factory.mktemp("cache") / "cache"
    return capture(ROWS, LocalTeacher(teacher_dir), directory, targets=TopK(8), progress=False)


def saving(directory, **kwargs):
    return settings(directory, save_strategy="steps", save_steps=2, max_steps=2, **kwargs)


def offline(directory, student, cache, peft_config=None, **kwargs):
    return OfflineKDTrainer(
        model=student,
        args=OfflineKDConfig(**saving(directory, lineage=RUN, **kwargs)),
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


def panel(directory, student, teachers, peft_config=None, **kwargs):
    names = list(teachers)
    return TeacherPanelTrainer(
        model=student,
        teacher_models=teachers,
        args=TeacherPanelConfig(**saving(directory, max_completion_length=4, lineage=RUN, **kwargs)),
        train_dataset=prompts(teacher_id=[names[i % len(names)] for i in range(24)]),
        peft_config=peft_config,
    )


def record(directory):
    return json.loads((directory / "lineage.json").read_text())


def assert_whole(directory):
    report = verify(directory)
    assert report.exit_code == 0, report.problems
    assert (directory / "NOTICE").is_file() and any((directory / "LICENSES").iterdir())


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_our_trainers(peft, tmp_path, student_dir, teacher_dir, other_teacher_dir, cache):
    teachers = {"math": teacher_dir, "code": other_teacher_dir}
    for name, trainer in {
        "offline": offline(tmp_path / "offline", student_dir, cache, peft),
        "panel": panel(tmp_path / "panel", student_dir, teachers, peft),
    }.items():
        trainer.train()
        checkpoint = tmp_path / name / "checkpoint-2"
        assert_whole(checkpoint)
        assert record(checkpoint)["checkpoint"]["step"] == 2
        trainer.save_model(str(tmp_path / name / "mine"))
        assert_whole(tmp_path / name / "mine")
    edges = {edge["kind"] for edge in record(tmp_path / "panel" / "checkpoint-2")["edges"]}
    assert "initialized_from" in edges and edges & {"corrected_by", "distilled_logits"}
    licenses = {path.name for path in (tmp_path / "panel" / "checkpoint-2" / "LICENSES").iterdir()}
    assert {"apache-2.0.txt", "mit.txt"} <= licenses


def test_a_cache_brings_its_teacher_along(tmp_path, student_dir, cache, teacher_dir):
    trainer = offline(tmp_path, student_dir, cache)
    trainer.train()
    written = json.dumps(record(tmp_path / "checkpoint-2"))
    assert "teacher_outputs" in written and "Apache-2.0" in written


def test_another_trainer_with_the_callback(tmp_path, student_dir):
    trainer = SFTTrainer(
        model=student_dir,
        args=SFTConfig(**saving(tmp_path)),
        train_dataset=ROWS,
        callbacks=[LicenseLineageCallback(lineage=RUN)],
    )
    trainer.train()
    assert_whole(tmp_path / "checkpoint-2")
    trainer.save_model()
    assert_whole(tmp_path)
    # A copy of the model saves its own weights, not the original's
    twin = copy.deepcopy(trainer.model)
    twin.get_input_embeddings().weight.data.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert not type(twin).from_pretrained(tmp_path / "twin").get_input_embeddings().weight.any()
    assert_whole(tmp_path / "twin")


def test_a_plain_transformers_trainer(tmp_path, student_dir):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(student_dir),
        args=TrainingArguments(**saving(tmp_path)),
        train_dataset=rows,
        callbacks=[LicenseLineageCallback(lineage=RUN)],
    )
    trainer.train()
    assert_whole(tmp_path / "checkpoint-2")
    assert verify(tmp_path / "checkpoint-2").exit_code == 0


def test_a_users_own_callback_declares_for_our_trainers(tmp_path, student_dir, cache):
    trainer = OfflineKDTrainer(
        model=student_dir,
        args=OfflineKDConfig(**saving(tmp_path)),
        teacher_cache=cache,
        processing_class=byte_tokenizer(),
        callbacks=[LicenseLineageCallback(lineage=RUN)],
    )
    trainer.train()
    assert record(tmp_path / "checkpoint-2")["run"]["id"] == "test-run"


def test_the_callback_refuses_when_the_trainer_is_built(tmp_path, student_dir):
    lineage = {"datasets": [{"repo": "someone/answers", "license": "mit", "generated_by": ["gpt-4o"]}]}
    with pytest.raises(LicenseRefusedError, match="OpenAI"):
        SFTTrainer(
            model=student_dir,
            args=SFTConfig(**saving(tmp_path)),
            train_dataset=ROWS,
            callbacks=[LicenseLineageCallback(lineage=lineage)],
        )


def test_same_run_same_bytes(tmp_path, student_dir, cache):
    for name in ("a", "b"):
        offline(tmp_path / name, student_dir, cache).train()
    first, second = (record(tmp_path / name / "checkpoint-2") for name in ("a", "b"))
    assert first.pop("saved_at") and second.pop("saved_at")
    assert first == second
    assert str(tmp_path) not in json.dumps(first)


def test_verify_tells_a_changed_weight_from_a_missing_marker(tmp_path, student_dir, cache):
    offline(tmp_path, student_dir, cache).train()
    checkpoint = tmp_path / "checkpoint-2"
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert verify(checkpoint).exit_code == 2
    (checkpoint / "lineage.json").unlink()
    assert verify(checkpoint).exit_code == 3


def test_weights_without_a_marker_when_lineage_cannot_be_written(tmp_path, student_dir, cache, monkeypatch):
    trainer = offline(tmp_path, student_dir, cache)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kd_plugin.lineage.RunLineage.write", full_disk)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert verify(tmp_path / "checkpoint-2").exit_code == 3
    # what a push calls first refuses, and so does the save that a push makes
    events = trainer.callback_handler
    with pytest.raises(LineageError):
        events.on_push_begin(trainer.args, trainer.state, trainer.control)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()


def test_a_push_takes_the_checkpoints_lineage(tmp_path, student_dir, cache):
    trainer = offline(tmp_path, student_dir, cache)
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    shutil.copy(tmp_path / "checkpoint-2" / "model.safetensors", tmp_path)  # as transformers does next
    assert_whole(tmp_path)


def test_a_resumed_run_stays_one_run_and_chains_to_its_parent(tmp_path, student_dir, cache):
    offline(tmp_path, student_dir, cache).train()
    second = offline(tmp_path, student_dir, cache)
    second.args.max_steps = 4
    second.args.lineage = None
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    parent, child = record(tmp_path / "checkpoint-2"), record(tmp_path / "checkpoint-4")
    assert child["run"]["id"] == parent["run"]["id"]
    assert child["checkpoint"]["parent"]
    assert_whole(tmp_path / "checkpoint-4")
